"""The objective `d(s)`: a black-box cost on text, from the user's function to the costs of a batch.

A cost function has the signature

    def cost(prompts, completions, **columns) -> list[float]

where `prompts` are the data set's prompts, unchanged, `completions` are the decoded texts and `columns` are the data
set's other columns: lists of the same length. It returns one number in `[0, D]` per completion; lower is better, 0 is
the best possible cost and D is the worst. Of several functions, one may return `None` for a completion that it does not
judge: it is left out of that completion's weighted sum. A function may be `async`, and it may be any callable object.
The same text for the same row must always have the same cost; [`aldrift_hf.objective.testing.check_objective`] tests a
function for this.
"""
