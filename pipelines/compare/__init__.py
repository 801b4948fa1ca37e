"""Methods against the dense model: measures, paired tests, a table and a page."""
