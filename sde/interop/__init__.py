"""Reading what other projects have trained."""
