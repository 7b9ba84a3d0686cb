"""How the embedded models were made: data, training, packaging and grading, reproducible from seeds."""
