"""How expert MLPs are computed; every engine has one signature."""
