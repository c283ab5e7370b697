//! What is said of a stage: its log, its warnings, and files called by the names that their user knows.

use crate::environment::{Environment, THREE, three, unwrapped};

/// Two users, of whom the stage before ranks for one; `line` is what it writes.
fn evaluated(line: &str) -> Environment {
    let env = three();
    let user = |u: usize| format!("{{\"user\":\"u{u}\",\"history\":[\"a\"],\"valid\":\"b\",\"test\":\"c\"}}\n");
    env.write("holdout.jsonl", &(user(0) + &user(1)));
    env.write("line", line);
    env.write(
        "e.yaml",
        r#"
name: e
stages:
  rank:
    uses: command
    inputs: { line: { file: line } }
    with: { run: "cat ${inputs.line} > ${outputs.out}" }
    outputs: { out: rankings.jsonl }
  evaluate:
    uses: evaluate
    inputs: { holdout: { file: holdout.jsonl }, few: rank.out }
    with: { k: [5], bootstrap: 0 }
"#,
    );
    env
}

const RANKING: &str = "{\"user\":\"u0\",\"split\":\"test\",\"target\":\"c\",\"items\":[\"c\"],\"scores\":[1]}\n";

#[test]
fn what_a_built_in_stage_warns_of_is_in_its_log_and_in_the_status() {
    let env = evaluated(RANKING);
    env.ok(&["run", "e.yaml"]);
    let warning = "has no ranking for 1 of 2 users";
    let log = env.ok(&["logs", "evaluate"]).stdout;
    assert!(log.contains(" grlm] warning: ") && log.contains(warning) && log.contains(" grlm] done in "), "{log}");
    let status = env.ok(&["status", "last"]).stdout;
    assert!(status.contains("warning of evaluate: ") && status.contains(warning), "{status}");
    assert!(!status.contains("never ran"), "why it ran is no more true: {status}");
}

#[test]
fn a_failure_calls_files_what_their_user_calls_them() {
    let env = evaluated("no ranking\n");
    let said = unwrapped(&env.fails(1, &["run", "e.yaml"]));
    assert!(said.contains("rank.out (rankings.jsonl)") && !said.contains("scratch/"), "{said}");
    let log = env.ok(&["logs", "evaluate"]).stdout;
    assert!(log.contains(" grlm] error: ") && log.contains("rank.out (rankings.jsonl)"), "{log}");
}

#[test]
fn the_log_of_a_cached_stage_is_that_of_the_run_that_made_it() {
    let env = Environment::new();
    env.write("src.txt", "x");
    let text = THREE.replace("echo upper >> journal;", "echo it is ${vars.source};");
    env.write("three.yaml", &format!("{text}variants:\n  other: {{ set: {{ vars.source: b.txt }} }}\n"));
    env.write("b.txt", "y");
    env.ok(&["run", "three.yaml"]);
    env.ok(&["run", "three.yaml", "--variant", "other"]);
    env.ok(&["run", "three.yaml"]);
    let told = env.ok(&["logs", "upper"]);
    assert!(told.stderr.contains("`upper` was cached in run ") && told.stderr.contains("; it ran in run "), "{told:?}");
    assert!(told.stdout.contains("it is src.txt"), "of the run that made this result: {told:?}");
    // Also for a run that is not the last one: the key of what it found is in its journal.
    env.ok(&["run", "three.yaml", "--set", "vars.source=b.txt"]);
    let runs = env.ok(&["status", "--json"]).stdout;
    let ids: Vec<String> = serde_json::from_str::<serde_json::Value>(&runs)
        .unwrap()
        .as_array()
        .map(|runs| runs.iter().filter_map(|run| run["id"].as_str().map(str::to_owned)).collect())
        .unwrap_or_default();
    assert_eq!(ids.len(), 4, "{runs}");
    let said: Vec<String> = ids.iter().map(|id| env.ok(&["logs", "upper", "--run", id]).stdout).collect();
    let of = |words: &str| said.iter().filter(|log| log.contains(words)).count();
    assert_eq!((of("it is src.txt"), of("it is b.txt")), (2, 2), "{said:?}");
}

#[test]
fn a_failed_command_is_told_where_its_own_log_is() {
    let env = three();
    env.write("three.yaml", &THREE.replace("tr a-z A-Z < ${inputs.text}", "exit 7"));
    let said = env.fails(1, &["run", "three.yaml"]);
    assert!(said.contains("`grlm logs upper`") && !said.contains("STAGE"), "{said}");
}
