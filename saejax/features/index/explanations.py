"""What somebody said of features: a model, a person, another library."""

import json
from pathlib import Path

from saejax.base.errors import FeatureIndexError


def load_explanations(file: Path) -> dict[int, str]:
    """{feature: explanation} of JSON lines, as {"feature": 12, "explanation": "..."}, or of `answers.jsonl` or `results.json` of
    another judge.
    """
    out = {}
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FeatureIndexError(f"{file}: not readable ({' '.join(str(error).split())[:150]})") from error
    for number, text in enumerate(_of_results(lines), 1):
        try:
            line = json.loads(text) if text.strip() else {"task": "-"}
            if line.get("task", "explain") != "explain":
                continue
            said = line["score"] if "task" in line else line["explanation"]
            if said is not None:
                out[int(line["feature"])] = str(said)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FeatureIndexError(f'{file}: line {number} is no {{"feature": 12, "explanation": "..."}}') from error
    if not out:
        raise FeatureIndexError(f"{file}: holds no explanation")
    return out


def _of_results(lines: list[str]) -> list[str]:
    """The lines, or those that `results.json` of a judge stands for."""
    try:
        features = json.loads("\n".join(lines))["features"]
        said = {int(number): values.get("explanation") for number, values in features.items()}
        return [json.dumps({"feature": feature, "explanation": text}) for feature, text in said.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return lines
