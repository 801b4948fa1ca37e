"""`diffattn bench`: times of methods beside dense attention, and the comparison of two runs."""
