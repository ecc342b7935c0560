"""Names of metrics that other modules than the one that measures them use; this module imports nothing."""

# The means over sources, in which a small source counts as much as a large one; those in eval.retain are left out.
MACRO = "eval/macro_loss"
MACRO_EXACT_MATCH = "eval/macro_exact_match"
# The share that is kept of what was known before the first step of the sources in eval.retain.
KEPT = "eval/kept"
