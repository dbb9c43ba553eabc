"""What an evaluation leaves behind: files of scores and predictions, a page, pictures."""
