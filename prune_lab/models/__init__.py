"""Loading models, and knowing where their parts are."""
