"""One MoE layer: router, experts, and what keeps them balanced."""
