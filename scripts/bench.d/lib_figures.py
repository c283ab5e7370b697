"""What every benchmark script shares: building grlm, installing peers, printing figures and judging them."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.environ["BENCH_ROOT"]
DATA = os.environ["GRLM_TEST_DATA"]
PEERS = os.environ["BENCH_PEERS"]
RELEASE = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "release")
GRLM = os.path.join(RELEASE, "grlm")
_missed = []


def build():
    subprocess.run(["cargo", "build", "--release", "--quiet", "--bin", "grlm"], cwd=ROOT, check=True)
    return GRLM


def example(package, name):
    """Builds an example of a package, which is how a part of it is timed alone."""
    command = ["cargo", "build", "--release", "--quiet", "-p", package, "--example", name]
    subprocess.run(command, cwd=ROOT, check=True)
    return os.path.join(RELEASE, "examples", name)


def debian(*packages):
    """Installs Debian packages that are not there yet."""
    missing = [p for p in packages if subprocess.run(["dpkg", "-s", p], capture_output=True).returncode]
    if missing:
        subprocess.run(["apt-get", "install", "-y", "-q", *missing], check=True, stdout=subprocess.DEVNULL)


def venv(*sets):
    """The peers' virtual environment, with the sets of packages (`torch`, `dag`) that are asked for."""
    folder = os.path.join(PEERS, "venv-" + "-".join(sets))
    done = os.path.join(folder, ".complete")
    if not os.path.exists(done):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["bash", os.path.join(DATA, "peers/setup.sh"), folder, *sets], check=True)
        open(done, "w").close()
    return os.path.join(folder, "bin")


def stage_seconds(pipeline, *arguments):
    """Runs a pipeline's text from scratch and gives each stage's seconds, its process's start included, and the folder
    of results (the caller removes its parent)."""
    work = tempfile.mkdtemp(prefix="bench-", dir=os.path.join(ROOT, "target"))
    with open(os.path.join(work, "bench.yaml"), "w") as f:
        f.write(pipeline)
    out = subprocess.run(
        [GRLM, "run", "bench.yaml", "--message-format", "json", *arguments], cwd=work, capture_output=True, text=True)
    events = [json.loads(line) for line in out.stdout.splitlines()]
    if out.returncode:
        sys.exit(out.stderr + "\n".join(e["message"] for e in events if e["kind"] == "failed"))
    return {e["stage"]: e["seconds"] for e in events if e["kind"] == "finished"}, os.path.join(work, "out/bench")


def published_names(files):
    """What our builders write, under the names that the reference's scripts give it."""
    names = {"sft_rec_simplified.json": "sft_rec.json", "sft_rec.json": "sft_rec_records.json",
             "sft_merged_rec_meta2tid.json": "sft_merged.json"}
    return {**files, **{theirs: files[ours] for theirs, ours in names.items() if ours in files}}


def seconds(call, *arguments):
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def figure(name, value, wanted=None, at_least=None, at_most=None, unit=""):
    """Prints `name: value (wanted …)` and remembers whether it was reached."""
    text = f"{value:.4g}{unit}"
    goal, ok = "", True
    if at_least is not None:
        goal, ok = f" (wanted >= {at_least:g}{unit})", value >= at_least
    if at_most is not None:
        goal, ok = f" (wanted <= {at_most:g}{unit})", value <= at_most
    if wanted is not None:
        goal, ok = f" (wanted {wanted})", value == wanted
    print(f"{name}: {text}{goal}{'' if ok else '  MISSED'}", flush=True)
    if not ok:
        _missed.append(name)


def finish():
    if _missed:
        sys.exit(f"not reached: {', '.join(_missed)}")
