"""Other routing for the same tokens: what if the rule were another, and a model run again with recorded experts."""
