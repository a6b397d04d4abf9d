"""JSON of files that somebody else made, read as the standard has it: one meaning for every reader, or none."""

import json
from typing import Any, NoReturn


def parsed(text: str | bytes, what: str, *, constants: bool = False) -> Any:
    """What a JSON document says. ValueError, in one line that begins with `what`, where a key is given twice, for NaN
    and Infinity (unless `constants`: transformers writes them), for numbers of thousands of digits, and for what is
    nested too deep, cut short or no JSON at all."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise _Refused(f"{what} has the key {twice[:40]!r} twice")
        return found

    def refuse(constant: str) -> NoReturn:
        raise _Refused(f"{what} holds {constant}, which is not JSON")

    try:
        whole = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(whole, object_pairs_hook=unique, parse_constant=None if constants else refuse)
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON, or cut short ({type(error).__name__})") from None
    except _Refused as refused:
        raise ValueError(str(refused)) from None
    except ValueError:  # Python's own limit of digits
        raise ValueError(f"{what} holds a number that is too long") from None


def is_count(value: Any) -> bool:
    """A whole number from 0 that an int64 holds; True and False are none."""
    return type(value) is int and 0 <= value < 2**63


class _Refused(ValueError):
    """Well-formed, and yet readers would disagree on it."""
