"""lm-eval's own command line with the model ``tokred``: ``python -m tokred.eval run --model tokred ...``."""

from tokred.eval.needed import need


def main() -> None:
    """The command line of lm-eval, after the model has been registered."""
    command = need("lm_eval.__main__", "python -m tokred.eval")
    need("tokred.eval.harness_model", "python -m tokred.eval")
    command.cli_evaluate()


if __name__ == "__main__":
    main()
