"""Graph passes: each takes the shared state of one Dynamo graph and rewrites it in place."""
