//! The care of the store: what it holds, what goes, what stays, what is wrong.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::Stdio,
    time::{Duration, Instant},
};

use crate::environment::{Environment, Running, THREE, three, wait_until};

fn json(env: &Environment, arguments: &[&str]) -> serde_json::Value {
    serde_json::from_str(&env.ok(arguments).stdout).unwrap()
}

#[test]
fn pinned_and_named_results_survive_a_collection_of_everything_else() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ok(&["pin", "first", "three.yaml"]);
    env.write("src.txt", "second\n");
    env.ok(&["run", "three.yaml", "--name", "second"]);
    env.write("src.txt", "third\n");
    env.ok(&["run", "three.yaml"]);
    env.ran();
    let foreseen = json(&env, &["gc", "--max-size", "0", "--json", "--dry-run"]);
    let done = json(&env, &["gc", "--max-size", "0", "--json"]);
    assert_eq!(foreseen["actions"], done["actions"]);
    assert_eq!(done["actions"].as_array().unwrap().len(), 3, "those of the third text");
    env.ok(&["run", "three.yaml"]);
    assert_eq!(env.ran(), ["count", "other", "upper"], "nobody kept them");
    for text in ["hello\n", "second\n"] {
        env.write("src.txt", text);
        env.ok(&["run", "three.yaml"]);
        assert!(env.ran().is_empty(), "{text}");
    }
    let pins = env.ok(&["pin"]).stdout;
    assert!(pins.contains("first") && pins.contains("second"), "{pins}");
    env.ok(&["unpin", "first"]);
    env.fails(2, &["unpin", "first"]);
    assert!(env.ok(&["verify"]).stdout.contains("all as they should be"));
}

#[test]
fn a_collection_beside_a_running_pipeline_takes_nothing_from_it() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    let slow = THREE.replace(
        "wc -c < ${inputs.text}",
        "touch started; while [ ! -e release ]; do sleep 0.1; done; grep -c HELLO ${inputs.text}",
    );
    env.write("three.yaml", &slow);
    let mut child = Running::start(env.command(&["run", "three.yaml"]).stderr(Stdio::null()));
    wait_until("the stage starts", || env.path("started").exists());
    assert!(env.ok(&["status"]).stdout.contains("running"));
    let mut collections = 0;
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(60), "the run never ends beside collections");
        env.ok(&["gc", "--max-size", "0", "--quiet"]);
        collections += 1;
        env.write("release", "");
    }
    assert!(child.wait().unwrap().success() && collections > 0);
    assert_eq!(env.read("out/three/count/count.txt"), "1\n");
    env.ok(&["gc", "--max-size", "0"]);
    env.ran();
    env.ok(&["run", "three.yaml"]);
    assert_eq!(env.ran().len(), 3, "now nothing kept them");
}

#[test]
fn du_names_pipelines_and_stages_and_the_limit_is_announced() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    let usage = json(&env, &["du", "--json"]);
    let stages: Vec<&str> = usage["stages"].as_array().unwrap().iter().filter_map(|s| s["stage"].as_str()).collect();
    assert_eq!(stages, ["other", "upper", "count"], "by size, then by name");
    let text = env.ok(&["du"]).stdout;
    assert!(text.contains("three") && text.contains("default limit"), "{text}");
    env.ok(&["gc", "--limit", "1KiB"]);
    env.write("src.txt", "other text\n");
    let said = env.ok(&["run", "three.yaml"]).stderr;
    assert!(said.contains("more than its limit of 1.0 KiB") && said.contains("grlm gc"), "{said}");
    env.ran();
    env.ok(&["run", "three.yaml"]);
    assert!(env.ran().is_empty(), "nothing goes by itself");
}

#[test]
fn verify_finds_a_flipped_bit_and_the_stage_runs_again() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ran();
    let blobs = env.tree(".grlm/blobs");
    let (blob, content) = blobs.iter().find(|(_, content)| content == b"HELLO\n").unwrap();
    let times = fs::metadata(blob).unwrap().modified().unwrap();
    fs::set_permissions(blob, fs::Permissions::from_mode(0o644)).unwrap();
    let mut flipped = content.clone();
    flipped[0] ^= 1;
    fs::write(blob, flipped).unwrap();
    fs::File::options().write(true).open(blob).unwrap().set_modified(times).unwrap();
    let outcome = env.grlm(&["verify"]);
    assert_eq!(outcome.code, 6);
    assert!(outcome.stdout.contains("three/upper"), "{}", outcome.stdout);
    env.ok(&["run", "three.yaml"]);
    assert_eq!(env.ran(), ["upper"]);
    assert_eq!(env.read("out/three/upper/upper.txt"), "HELLO\n");
    env.ok(&["verify"]);
}

#[test]
fn a_store_of_a_newer_version_is_refused_by_every_verb_and_left_alone() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ran();
    env.write(".grlm/VERSION", "2\n");
    let before = env.tree(".grlm");
    let verbs: [&[&str]; 8] = [
        &["run", "three.yaml"],
        &["plan", "three.yaml"],
        &["gc", "--max-size", "0"],
        &["verify"],
        &["du"],
        &["pin", "x", "three.yaml"],
        &["explain", "three.yaml", "upper"],
        &["accept", "three.yaml", "upper"],
    ];
    for verb in verbs {
        let said = env.fails(4, verb);
        assert!(said.contains("newer") && said.contains("--store"), "{verb:?}: {said}");
    }
    assert!(env.tree(".grlm") == before && env.ran().is_empty());
}

#[test]
fn a_lost_index_costs_nothing_but_time() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ran();
    fs::remove_dir_all(env.path(".grlm/index")).unwrap();
    env.ok(&["run", "three.yaml"]);
    for (path, _) in env.tree(".grlm/index") {
        fs::write(path, "garbage").unwrap();
    }
    env.ok(&["run", "three.yaml"]);
    assert!(env.ran().is_empty());
}

#[test]
fn status_tells_past_runs_and_their_stages() {
    let env = three();
    assert!(env.grlm(&["status"]).stderr.contains("no run"));
    env.ok(&["run", "three.yaml"]);
    env.write("three.yaml", &THREE.replace("cat ${inputs.text}", "exit 3"));
    env.fails(1, &["run", "three.yaml"]);
    let list = env.ok(&["status"]).stdout;
    assert!(list.contains("done") && list.contains("failed"), "{list}");
    let last = json(&env, &["status", "last", "--json"]);
    assert_eq!(last[0]["state"], "failed");
    assert_eq!(last[0]["stages"]["other"]["state"], "failed");
    assert_eq!(last[0]["stages"]["upper"]["state"], "cached");
    env.fails(2, &["status", "nonsense"]);
}

#[test]
fn doctor_tells_what_is_missing_and_is_content_when_nothing_is() {
    let env = three();
    let healthy = env.ok(&["doctor", "three.yaml", "--devices", "sim:2x80GiB"]).stdout;
    assert!(healthy.contains("2 GPUs") && healthy.contains("src.txt") && healthy.contains("free"), "{healthy}");
    fs::remove_file(env.path("src.txt")).unwrap();
    env.write("three.yaml", &THREE.replacen("  count:\n", "  count:\n    resources: { gpus: 3 }\n", 1));
    let outcome = env.grlm(&["doctor", "three.yaml", "--devices", "sim:2x80GiB"]);
    assert_eq!(outcome.code, 6, "{}", outcome.stderr);
    assert!(outcome.stdout.contains("src.txt") && outcome.stdout.contains("3 GPUs"), "{}", outcome.stdout);
    let findings: serde_json::Value = serde_json::from_str(&env.grlm(&["doctor", "--json"]).stdout).unwrap();
    assert!(findings.as_array().unwrap().iter().all(|finding| finding["grade"] != "wrong"));
}

/// What is only asked for is not done: the limit of the store stays, and a name that cannot be kept is refused first.
#[test]
fn a_dry_run_sets_no_limit_and_a_bad_name_is_refused_before_the_run() {
    let env = three();
    assert!(env.fails(4, &["run", "three.yaml", "--name", "bad name"]).contains("bad name"));
    assert!(env.ran().is_empty());
    env.ok(&["run", "three.yaml"]);
    let limit = || env.ok(&["du"]).stdout.lines().last().unwrap_or_default().to_owned();
    let before = limit();
    env.ok(&["gc", "--limit", "7KiB", "--dry-run"]);
    assert_eq!(limit(), before);
    env.ok(&["gc", "--limit", "7KiB"]);
    assert!(limit().contains("7.0 KiB"), "{}", limit());
}

#[test]
fn a_time_for_no_stage_is_refused() {
    let env = three();
    let plan = ["plan", "three.yaml", "--devices", "sim:1x80GiB", "--duration"];
    let said = env.fails(3, &[&plan[..], &["cuont=5s"]].concat());
    assert!(said.contains("`cuont`, which is no stage") && said.contains("did you mean `count`?"), "{said}");
    env.ok(&[&plan[..], &["count=5s"]].concat());
}
