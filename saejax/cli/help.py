"""The jobs of the command line: what each says of itself and which options it takes. Does not import jax."""

from dataclasses import dataclass

from saejax.base.version import __version__


@dataclass(frozen=True)
class Job:
    """A job of the command line: what it says of itself and which options it takes."""

    summary: str
    usage: str
    text: str
    example: str
    takes_config: bool = True
    options: tuple[str, ...] = ()


_CONFIG = """\
  --config=FILE            Python file whose get_config() returns the config (it is executed)
  --config.KEY=VALUE       change one key, e.g. --config.train.tokens=2000000; docs/config.md has all
"""
_SUBJECT = """\
  --model=MODEL            language model, instead of the one that run or files name
  --hookpoint=NAME         where in it the SAE reads, as blocks.9.hook_resid_post or model.layers.9
  --text=SOURCES           its text: presets, files, directories or hub ids, with commas between
  --context=N              tokens of a row of it
  --store=DIR              an activation store, for statistics (and the index) instead of the text
  --format=NAME            of the files, where several fit
"""
_SUBJECTS = ("model", "hookpoint", "text", "context", "store", "format")
_INDEX = """\
  --index=DIR              an index that lies elsewhere than in the run
"""
_DISTRIBUTED = """\
  --distributed            this is one of several processes; a TPU pod needs nothing more, Slurm, GKE and
                           launch/jobset.yaml not even this
  --coordinator=HOST:PORT  elsewhere the address of process 0,
  --num_processes=N        how many there are,
  --process_id=I           and the number of this one, from 0
  --start_timeout=SECONDS  until all of them must be there (300)
  --heartbeat=SECONDS      until a silent process counts as dead and ends the others (100)
"""

JOBS = {
    "run": Job(
        "everything: harvest, train, evaluate, release, report",
        "saejax run --config=FILE [--config.KEY=VALUE ...]\n       saejax run RUN_DIR",
        "Reads text and a language model; writes the run directory `config.run_dir` (default runs/<name>):\n"
        "config.json, store/, metrics.jsonl, tensorboard/, checkpoints/, eval.json, release/, report.html.\n"
        "The same command again goes on where an interrupted one stopped, and only shows the results of a\n"
        "finished one. RUN_DIR goes on with that run's own config.\n\n"
        "A config with a sweep trains several SAEs on the same rows, harvested once, each in a run directory of\n"
        "its own below `config.run_dir`, and shows them side by side (docs/sweeps.md).\n\n"
        "options:\n" + _CONFIG + _DISTRIBUTED,
        "saejax run --config=configs/demo.py", options=("distributed",)),
    "harvest": Job(
        "language model activations of a text -> activation store",
        "saejax harvest --config=FILE [--config.KEY=VALUE ...]\n       saejax harvest RUN_DIR",
        "Reads text and a language model; writes the activation store `config.harvest.store` (default\n"
        "<run_dir>/store). An interrupted harvest goes on at the next shard and gives the same bytes; a\n"
        "finished store is left as it is.\n\n"
        "options:\n" + _CONFIG + _DISTRIBUTED,
        "saejax harvest --config=configs/demo.py --config.harvest.tokens=1000000", options=("distributed",)),
    "train": Job(
        "activation store -> checkpoints of a sparse autoencoder",
        "saejax train --config=FILE [--config.KEY=VALUE ...]\n       saejax train RUN_DIR",
        "Reads a finished activation store; writes metrics.jsonl, tensorboard/ and checkpoints/ in the run\n"
        "directory. Resumes the newest checkpoint that verifies. SIGTERM or Ctrl-C saves the state first\n"
        "(exit code 75). All SAEs of a sweep train on the same rows; one that diverges is stopped by itself, and\n"
        "the exit code is 2 at the end.\n\n"
        "options:\n" + _CONFIG + _DISTRIBUTED,
        "saejax train runs/demo", options=("distributed",)),
    "eval": Job(
        "measure SAEs on held-out text, side by side",
        "saejax eval SAE [SAE ...] [--contexts=N]\n       saejax eval --config=FILE",
        "Reads SAEs: runs (or RUN/checkpoints/STEP), releases, files of any format that saejax.load reads, places on\n"
        "the hub as org/repo:path; and their stores' statistics, else those of the text. Of runs it writes\n"
        "RUN/eval.json. Prints a table: L0, FVU and explained variance with and without outlier tokens, cross-entropy\n"
        "clean, spliced, zero- and mean-ablated, recovered share, KL, dead features. Results are kept per checkpoint\n"
        "step and options; a second call is instant. The directory of a sweep stands for all its SAEs. --config=FILE\n"
        "means the run at its run_dir, with the eval, log and mesh sections given now; the other keys must be those\n"
        "of the run.\n\n"
        "options:\n  --contexts=N             held-out contexts, instead of the run's config.eval.contexts\n"
        "  --json                   print the results as JSON\n" + _SUBJECT + _CONFIG + _DISTRIBUTED,
        "saejax eval runs/demo runs/demo_relu", options=("distributed", "contexts", "json", *_SUBJECTS)),
    "release": Job(
        "a checkpoint -> a directory that loads anywhere",
        "saejax release RUN_OR_STEP [--out=DIR] [--jumprelu]\n       saejax release --config=FILE",
        "Reads a run directory (its newest checkpoint that verifies) or one checkpoint step, also while the run\n"
        "goes on; writes cfg.json, sae_weights.safetensors, metrics.json and README.md to DIR (default\n"
        "RUN/release). saejax.load and SAELens read it.\n\n"
        "options:\n  --out=DIR                where to write\n"
        "  --jumprelu               a topk SAE with one threshold for all rows, of the same mean L0,\n"
        "                           measured on rows of the run's activation store\n" + _CONFIG + _DISTRIBUTED,
        "saejax release runs/demo/checkpoints/400 --out=my_sae", options=("distributed", "out", "jumprelu")),
    "plan": Job(
        "what a config needs on a pod: memory, collectives, time",
        "saejax plan --config=FILE [--topology=CHIPS] [--config.KEY=VALUE ...]\n       saejax plan RUN_DIR",
        "Reads the config, and the width of the activations from the store or the language model's config; writes\n"
        "nothing. Prints bytes per chip by kind, FLOPs, collectives, predicted step time and tokens/s, store and\n"
        "harvest, days for config.train.tokens, and the smallest topologies that fit. docs/plan.md has the model.\n\n"
        "options:\n  --topology=CHIPS         v5e:8x8, v5p:4x8x8, v6e:16x16, h100:8x4 (GPUs per node x nodes), h200:8,\n"
        "                           cpu:8; without it only what fits is listed\n"
        "  --d_in=WIDTH             width of the activations, where nothing here tells it\n"
        "  --compile                compile the training step for a TPU topology (pip install 'saejax[tpu-plan]')\n"
        "                           or for cpu:N, and report the compiler's memory and collectives\n"
        "  --json                   print the plan as JSON\n" + _CONFIG,
        "saejax plan --config=configs/smollm2_pod.py --topology=v5p:4x4x4", options=("topology", "d_in", "compile", "json")),
    "convert": Job(
        "an SAE of any library -> the files of another one",
        "saejax convert SRC DST --to=FORMAT [--approximate --rows=FILE.npy]",
        "Reads SRC: a run, a checkpoint step, a release, files of SAELens, sparsify, dictionary_learning, Gemma\n"
        "Scope, OpenAI, OpenMOSS or Goodfire, or org/repo:path of the Hugging Face hub; writes the directory DST,\n"
        "reads it back and compares. What the format cannot express exactly is refused with the reason\n"
        "(docs/formats.md).\n\n"
        "options:\n  --to=FORMAT              saelens, dictionary_learning, sparsify or gemma_scope\n"
        "  --approximate            topk for Gemma Scope: one threshold, of the same mean L0 on the rows\n"
        "  --rows=FILE.npy          activations [N, d_in] on which that is fitted and measured\n",
        "saejax convert runs/demo my_sae --to=dictionary_learning", takes_config=False, options=("to", "approximate", "rows")),
    "features": Job(
        "what the features of an SAE fire on: the index",
        "saejax features SAE [--tokens=N] [--split=SPLIT] [--baseline=NAME] [--out=DIR] [--verify=N]\n"
        "       saejax features RUN --export=neuronpedia",
        "Reads a run (its newest checkpoint that verifies, or one step), its store and its language model, or files of\n"
        "any format that saejax.load reads, a text (--text) and the language model; writes the index to DIR (default\n"
        "RUN/features): per feature density, histograms, examples of every level of\n"
        "activation with their context, top tokens, effect on the next token, neighbours. An interrupted index\n"
        "goes on where it stopped; a finished one is left as it is; one of another checkpoint is refused.\n"
        "docs/features.md describes it.\n\n"
        "options:\n  --tokens=N               index the first N tokens (default: all of the store, or 1,000,000)\n"
        "  --split=train|heldout    a split of the text, through the language model, instead of the store\n"
        "  --baseline=NAME          index what features are held against instead, in RUN/features_NAME: neurons (of the\n"
        "                           MLP below, through the language model), directions (random), random_sae (untrained)\n"
        "  --out=DIR                where to write\n"
        "  --rebuild                remove the index that is there and begin anew\n"
        "  --verify=N               run N examples again through language model and SAE, and say how they differ\n"
        "  --export=neuronpedia     also write the feature JSON that Neuronpedia imports, neuronpedia/ beside the index\n"
        "  --json                   print what was made as JSON\n" + _SUBJECT + _DISTRIBUTED,
        "saejax features runs/demo --verify=1000", takes_config=False,
        options=("distributed", "out", "tokens", "split", "baseline", "rebuild", "verify", "export", "json", *_SUBJECTS)),
    "search": Job(
        "features by prompt, answer, sets of prompts, text of examples, or likeness",
        "saejax search SAE --prompt=TEXT | --set=NAME | --positives=FILE | --find=TEXT | --like=FEATURE",
        "Reads a run or any files of an SAE, the language model (not for --find and --like) and the index, RUN/features\n"
        "or --index (needed for --find); prints the features that fit best and writes nothing.\n\n"
        "options:\n  --prompt=TEXT            the most active features on this text\n"
        "  --prompt=TEXT --answer=TOKEN [--against=TOKEN]\n"
        "                           those that speak most for this next token (and against that one)\n"
        "  --positives=FILE [--negatives=FILE]\n"
        "                           those active on all of these prompts (one a line) and none of those\n"
        "  --set=NAME               the same with prompts that come with saejax: code_vulnerabilities,\n"
        "                           deception_and_power, sycophancy, bias, dangerous_content; or multilingual:\n"
        "                           features that follow the meaning of sentences in five languages\n"
        "  --find=TEXT [--explanations=FILE]\n"
        "                           those whose top examples (or explanations in this file) hold this text\n"
        "  --like=FEATURE|FILE.npy [--within=SAE]\n"
        "                           decoder directions nearest to a feature's or to a vector (in another\n"
        "                           dictionary: feature splitting)\n"
        "  --json                   print one JSON list\n" + _INDEX + _SUBJECT,
        "saejax search runs/demo --prompt='To be, or not to be'", takes_config=False,
        options=("prompt", "answer", "against", "positives", "negatives", "find", "explanations", "like", "within", "set",
                 "json", "index", *_SUBJECTS)),
    "dashboard": Job(
        "a site of an index that opens from disk",
        "saejax dashboard SAE_OR_INDEX [--index=DIR] [--explanations=FILE] [--map] [--out=DIR]",
        "Reads the index of a run (RUN/features), or the one given; writes index.html and its data to DIR (default\n"
        "dashboard/ beside the index). Nothing is loaded from elsewhere and no server is needed.\n\n"
        "options:\n"
        "  --explanations=FILE      what somebody says of features, to show and to search: JSON lines\n"
        "                           {\"feature\": 12, \"explanation\": \"...\"}, or the answers.jsonl of saejax judge\n"
        "  --map                    a picture of all features by UMAP: near are those of like decoder directions\n"
        "                           (needs pip install 'saejax[umap]')\n"
        "  --out=DIR                where to write\n" + _INDEX + _SUBJECT,
        "saejax dashboard runs/demo", takes_config=False, options=("explanations", "map", "out", "index", *_SUBJECTS)),
    "steer": Job(
        "how a prompt goes on with a feature set, ablated, or a direction added",
        "saejax steer RUN_OR_FILES --prompt=TEXT --feature=N [--scale=-5,0,5] [--ablate] [--positions=WHERE]\n"
        "       saejax steer RUN_OR_FILES --prompt=TEXT --add-direction=FILE.npy | --positives=FILE --negatives=FILE",
        "Reads a run with its index (RUN/features), or any files that saejax.load reads, and the language model; prints\n"
        "the unsteered continuation and one of each change, all made in one batch; writes nothing but the page of\n"
        "--html. docs/steering.md has the equations.\n\n"
        "options:\n  --prompt=TEXT            what to go on with\n"
        "  --feature=N              set this feature, the rest of the SAE and its error being kept,\n"
        "  --scale=LIST             to these multiples of its maximum in the index (default -5,5)\n"
        "  --max=VALUE              the maximum, where there is no index\n"
        "  --ablate                 set it to 0\n"
        "  --add-direction=FILE.npy add this vector\n"
        "  --positives=FILE --negatives=FILE\n"
        "                           add the few-shot vector: mean at the last token of these prompts (one a line) less\n"
        "                           mean of those\n"
        "  --vector_scale=LIST      multiples of the vectors (default 1)\n"
        "  --positions=WHERE        all: every token but special ones, of prompt and continuation (default); last: the\n"
        "                           prompt's last; 3,4: these of the prompt, BOS being 0\n"
        "  --tokens=N               length of the continuation (default 40)\n"
        "  --temperature=T          of sampling (default 0: the most likely token)\n"
        "  --html=FILE              write a page, too\n"
        "  --json                   print one JSON list\n" + _INDEX + _SUBJECT,
        "saejax steer runs/demo --prompt='To be, or not' --feature=123 --scale=-5,0,5 --html=steered.html", takes_config=False,
        options=("prompt", "feature", "scale", "max", "ablate", "add-direction", "positives", "negatives", "vector_scale",
                 "positions", "tokens", "temperature", "html", "json", "index", *_SUBJECTS)),
    "attribute": Job(
        "which features of a prompt speak for its next token, by attribution and by ablation",
        "saejax attribute RUN_OR_FILES --prompt=TEXT --token=TOKEN [--against=TOKEN] [--html=FILE]",
        "Reads a run, or any files that saejax.load reads, and the language model; prints attribution and ablation of\n"
        "features at tokens for logit(token) - logit(against), and how the two correlate; writes nothing but the page\n"
        "of --html.\n\n"
        "options:\n  --prompt=TEXT            what the token follows\n"
        "  --token=TOKEN            a next token; a leading blank often matters\n"
        "  --against=TOKEN          another one (default: the mean logit)\n"
        "  --pairs=N                ablate N of the active pairs of token and feature, drawn at random (default: all)\n"
        "  --html=FILE              write a page, too\n"
        "  --json                   print one JSON object with all pairs\n" + _INDEX + _SUBJECT,
        "saejax attribute runs/demo --prompt='The capital of France is' --token=' Paris' --against=' Rome'", takes_config=False,
        options=("prompt", "token", "against", "pairs", "html", "json", "index", *_SUBJECTS)),
    "neurons": Job(
        "features against neurons: the highest correlation of each with a neuron before it",
        "saejax neurons SAE [--tokens=N] [--sample=N] [--split=SPLIT] [--out=DIR]",
        "Reads an SAE, its text and its language model; writes DIR/neurons.parquet (default RUN/neurons), a row a\n"
        "feature, and prints the share of features that no neuron follows. Saved every five minutes; an interrupted\n"
        "pass goes on.\n\n"
        "options:\n  --tokens=N               of the text (default 200,000)\n"
        "  --sample=N               features, at random (default: all, or as many as fit in 1 GiB, 8 bytes a pair)\n"
        "  --split=train|heldout    split of the text (default train)\n"
        "  --out=DIR                where to write\n"
        "  --json                   print the shares as JSON\n" + _SUBJECT,
        "saejax neurons runs/demo", takes_config=False, options=("tokens", "sample", "split", "out", "json", *_SUBJECTS)),
    "judge": Job(
        "how specific features are and how well they can be explained, by a model or by people",
        "saejax judge SAE --judge=WHO --features=1,2,3 | --sample=N [--do=TASKS] [--draw=N]",
        "Reads an SAE, its index (`saejax features`) and its store or language model; writes prompts, raw answers and\n"
        "scores to judging/ beside the index, as RUN/judging/features/JUDGE (or DIR): answers.jsonl, results.json,\n"
        "report.html. Says how many questions there are, then asks those that have no answer yet: the same command\n"
        "again goes on, other features are added. docs/judging.md describes methods and files.\n\n"
        "options:\n"
        "  --judge=http://localhost:8000/v1 --judge_model=NAME\n"
        "                           an OpenAI-compatible endpoint; its key, if it needs one, is read from the\n"
        "                           environment variable SAEJAX_JUDGE_KEY and written nowhere\n"
        "  --judge=local:MODEL      a language model that runs here, named as in config.lm.model\n"
        "  --judge=csv:FOLDER       people: writes sheets (HTML and CSV) to FOLDER and reads filled ones from it\n"
        "  --features=1,2,3         features to judge, or\n"
        "  --sample=N               so many, drawn at random from those that fire\n"
        "  --do=TASKS               of explain, rubric, detect, fuzz, simulate (default explain,rubric,detect)\n"
        "  --draw=N                 rubric: N activations of each feature drawn from the whole corpus (the paper:\n"
        "                           1000) instead of the index' examples\n"
        "  --explanations=FILE      JSON lines {\"feature\": 12, \"explanation\": \"...\"}, or the answers.jsonl of\n"
        "                           another judge, instead of asking for explanations\n"
        "  --baseline=NAME          judge neurons, directions or random_sae (index them first)\n"
        "  --concurrency=N          requests at a time (4)\n"
        "  --timeout=SECONDS        of one request (120); each question is tried up to 5 times\n"
        "  --out=DIR                where to write\n"
        "  --json                   print the results as JSON\n" + _INDEX + _SUBJECT,
        "saejax judge runs/demo --judge=http://localhost:11434/v1 --judge_model=qwen3:8b --sample=50", takes_config=False,
        options=("judge", "judge_model", "features", "sample", "do", "draw", "explanations", "baseline", "concurrency",
                 "timeout", "out", "json", "index", *_SUBJECTS)),
    "push-to-hub": Job(
        "a release -> a Hugging Face repository; says what it would do unless --yes",
        "saejax push-to-hub RELEASE --repo=ORG/NAME [--license=ID] [--yes]",
        "Reads and verifies a release directory; without --yes it lists what it would upload and writes nothing.\n"
        "With --yes it makes the repository where there is none and writes cfg.json, sae_weights.safetensors,\n"
        "metrics.json and README.md in one commit, with the account that `hf auth login` logged in.\n\n"
        "options:\n  --repo=ORG/NAME          the repository\n"
        "  --license=ID             licence of the weights as the hub spells it, e.g. apache-2.0\n"
        "  --yes                    upload\n",
        "saejax push-to-hub runs/demo/release --repo=me/my-sae", takes_config=False,
        options=("repo", "license", "yes")),
    "bench": Job(
        "how fast this machine trains, reads and harvests",
        "saejax bench [--only=NAMES] [--out=FILE.md] [--json] [--OPTION=VALUE ...]",
        "Reads the language model where harvest is asked for; writes nothing but, with --out, a page. Runs each\n"
        "benchmark in a process of its own and prints a table, or JSON: medians and quartiles of the repeats, peak\n"
        "memory, the machine's class, the command. Nothing else should run meanwhile.\n\n"
        "options:\n  --only=NAMES             of selection, step (dense against sparse path), devices, reader, harvest\n"
        "  --kind=RECIPES           of the training steps (topk,batchtopk,relu); devices takes the first\n"
        "  --d_in=768 --d_sae=16384 --batch=1024 --k=32\n"
        "                           sizes of the training steps; d_in of the reader, too\n"
        "  --steps=5 --repeats=5    steps of a repeat, and how many repeats\n"
        "  --compute_dtype=auto     of the products: float32, bfloat16, or auto (bfloat16 on GPUs and TPUs)\n"
        "  --devices=1,2,4,8        numbers of devices, one after the other; on a CPU simulated ones\n"
        "  --threads=N              processors to use (default: all that this process may use)\n"
        "  --megabytes=1000         of the store that the reader reads\n"
        "  --model=M --source=TEXT --hookpoint=NAME --tokens=32768\n"
        "                           what is harvested (smollm2-135m, shakespeare, blocks.9.hook_resid_post)\n"
        "  --out=FILE.md            write the tables between the marks of this page, or to a new one\n"
        "  --json                   print JSON\n",
        "saejax bench --only=step --d_sae=65536 --batch=512", takes_config=False,
        options=("only", "kind", "d_in", "d_sae", "batch", "k", "steps", "repeats", "devices", "compute_dtype", "threads",
                 "megabytes", "tokens", "model", "source", "hookpoint", "out", "json")),
    "inspect": Job(
        "say what a store, run, checkpoint or release is, and verify it",
        "saejax inspect PATH [PATH ...] [--json]",
        "Reads everything under PATH and checks it against its digests; writes nothing. Exit code 0 when all of\n"
        "it verifies, 2 when not, with one line for every file or array that does not.\n\n"
        "options:\n  --json                   print one JSON object per path\n",
        "saejax inspect runs/demo", takes_config=False, options=("json",)),
}

_EXIT_CODES = """\
exit codes:
  0   done
  2   a mistake that can be repaired (one line on stderr says what and how)
  75  stopped on request with the state saved (SIGTERM, Ctrl-C while training); the same command goes on
  130 interrupted by Ctrl-C outside training; the same command goes on
  1   a bug, with its traceback
"""


def overview() -> str:
    """What `saejax --help` prints."""
    jobs = "\n".join(f"  {name:<12}{job.summary}" for name, job in JOBS.items())
    return (f"saejax {__version__}: sparse autoencoders on language-model activations\n\n"
            "usage: saejax JOB --config=FILE [--config.KEY=VALUE ...]\n       saejax JOB PATH ...\n\n"
            f"jobs:\n{jobs}\n\nexample:\n  {JOBS['run'].example}\n\n"
            "`saejax JOB --help` says what a job reads and writes; `saejax --version` prints the version.\n\n"
            f"{_EXIT_CODES}")


def job_help(name: str) -> str:
    """What `saejax JOB --help` prints."""
    job = JOBS[name]
    return (f"saejax {name}: {job.summary}\n\nusage: {job.usage}\n\n{job.text}\n"
            f"example:\n  {job.example}\n\n{_EXIT_CODES}")
