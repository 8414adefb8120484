"""Parts that meet an outside technology, a folder for each."""
