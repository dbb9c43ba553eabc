"""The report of an evaluation: scores, predictions, an HTML page and pictures."""
