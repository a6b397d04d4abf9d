"""What random routing would give: bands, exact tails, documents as draws, experts on nodes."""
