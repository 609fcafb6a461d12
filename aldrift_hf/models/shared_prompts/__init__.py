"""A prompt is computed once for all of its completions: in drawing, in scoring and in learning."""
