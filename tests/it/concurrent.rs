//! Several `grlm` at once on one empty store: counted, not timed.

use std::{fs::File, process::Command, thread};

use crate::environment::{Environment, Running, wait_until};

/// A preparation, two branches that share it, and an end that depends on the variant.
const SHARED: &str = r#"
name: shared
vars: { n: 0 }
stages:
  prepare:
    uses: command
    with: { run: "echo prepare >> journal; sleep 0.2; echo prepared > ${outputs.out}" }
    outputs: { out: p.txt }
  left:
    uses: command
    inputs: { p: prepare }
    with: { run: "echo left >> journal; sleep 0.2; cat ${inputs.p} > ${outputs.out}; echo left >> ${outputs.out}" }
    outputs: { out: l.txt }
  right:
    uses: command
    inputs: { p: prepare }
    with: { run: "echo right >> journal; sleep 0.2; cat ${inputs.p} > ${outputs.out}; echo right >> ${outputs.out}" }
    outputs: { out: r.txt }
  end:
    uses: command
    inputs: { l: left, r: right }
    with: { run: "echo end ${vars.n} >> journal; cat ${inputs.l} ${inputs.r} > ${outputs.out}; echo ${vars.n} >> ${outputs.out}" }
    outputs: { out: e.txt }
variants:
  n: { matrix: { vars.n: [1, 2, 3, 4, 5, 6, 7, 8] } }
"#;

fn all_succeed(commands: Vec<Command>) {
    let children: Vec<Running> = commands.into_iter().map(|mut command| Running::start(&mut command)).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn eight_runs_of_one_pipeline_compute_each_action_once() {
    let env = Environment::new();
    env.write("shared.yaml", SHARED);
    all_succeed((0..8).map(|_| env.command(&["run", "shared.yaml", "--quiet"])).collect());
    assert_eq!(env.ran(), ["end 0", "left", "prepare", "right"]);
    assert_eq!(env.read("out/shared/end/e.txt"), "prepared\nleft\nprepared\nright\n0\n");
}

#[test]
fn eight_variants_compute_what_they_share_once() {
    let env = Environment::new();
    env.write("shared.yaml", SHARED);
    let cell = |n: usize| format!("n[vars.n={n}]");
    all_succeed((1..=8).map(|n| env.command(&["run", "shared.yaml", "--quiet", "--variant", &cell(n)])).collect());
    let mut wanted: Vec<String> = (1..=8).map(|n| format!("end {n}")).collect();
    wanted.extend(["left", "prepare", "right"].map(str::to_owned));
    assert_eq!(env.ran(), wanted);
}

#[test]
fn who_waits_says_for_whom_and_holds_no_devices() {
    if thread::available_parallelism().is_ok_and(|cores| cores.get() < 2) {
        eprintln!("skipped: two runs at once need two cores");
        return;
    }
    let env = Environment::new();
    // The stage ends once another run has done something: on two cores only if the one that waits holds none.
    let wait =
        "i=0; while [ ! -e solo ] && [ $i -lt 1000 ]; do sleep 0.1; i=$((i+1)); done; test -e solo && echo prepared";
    env.write("shared.yaml", &SHARED.replace("sleep 0.2; echo prepared", wait));
    env.write(
        "solo.yaml",
        "name: solo\nstages:\n  s:\n    uses: command\n    with: { run: \"touch solo; echo s > ${outputs.out}\" }\n    outputs: { out: s.txt }\n",
    );
    let first = Running::start(&mut env.command(&["run", "shared.yaml", "--quiet"]));
    let holder = first.id();
    wait_until("the first run is at its first stage", || env.path("journal").exists());
    let said = File::create(env.path("said")).unwrap();
    let waiter = Running::start(env.command(&["run", "shared.yaml"]).stderr(said));
    let waits = format!("waits for process {holder} on ");
    wait_until("the second says for whom it waits", || env.read("said").contains(&waits));
    env.ok(&["run", "solo.yaml"]);
    for mut child in [first, waiter] {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(env.ran(), ["end 0", "left", "prepare", "right"]);
}

#[test]
fn who_can_start_nothing_says_what_others_hold() {
    let env = Environment::new();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let stage = |name: &str, resources: &str, run: &str| {
        let pipeline = format!(
            "name: {name}\nstages:\n  s:\n    uses: command\n    resources: {resources}\n    with: {{ run: \"{run}; echo s > ${{outputs.out}}\" }}\n    outputs: {{ out: s.txt }}\n"
        );
        env.write(&format!("{name}.yaml"), &pipeline);
    };
    let wait = "touch began; i=0; while [ ! -e go ] && [ $i -lt 1000 ]; do sleep 0.1; i=$((i+1)); done; test -e go";
    stage("all", &format!("{{ cpus: {cores} }}"), wait);
    stage("one", "{ cpus: 1 }", "true");
    let first = Running::start(&mut env.command(&["run", "all.yaml", "--quiet"]));
    let holder = first.id();
    wait_until("the first run has all cores", || env.path("began").exists());
    let said = File::create(env.path("said")).unwrap();
    let waiter = Running::start(env.command(&["run", "one.yaml"]).stderr(said));
    let waits = format!("s: waits for what other runs hold: process {holder} holds {cores} core");
    wait_until("the second says what it waits for", || env.read("said").contains(&waits));
    env.write("go", "");
    for mut child in [first, waiter] {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(env.read("said").matches("waits for what").count(), 1);
}
