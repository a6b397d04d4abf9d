"""How balanced routing is: numbers beside what chance gives, verdicts in words, tables of both."""
