"""The domain: pages, tails, tables, attention and the pipeline. torch and attrs only."""
