"""How each model family is trained."""
