"""From a table of URLs and captions to shards of pictures, with a ledger that accounts for every row."""
