//! What runs, and what does not run again.

use std::{fs, os::unix::fs::PermissionsExt};

use crate::environment::{THREE, three};

#[test]
fn a_second_run_does_nothing_and_a_first_one_everything() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    assert_eq!(env.ran(), ["count", "other", "upper"]);
    assert_eq!(env.read("out/three/upper/upper.txt"), "HELLO\n");
    env.ok(&["run", "three.yaml"]);
    assert!(env.ran().is_empty());
}

#[test]
fn comments_order_and_renames_of_stages_run_nothing() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ran();
    env.write("three.yaml", &format!("# a comment\n{}", THREE.replace("  other:\n", "  renamed: # so\n")));
    env.ok(&["run", "three.yaml"]);
    assert!(env.ran().is_empty());
    assert_eq!(env.read("out/three/renamed/other.txt"), "hello\n");
}

#[test]
fn an_equal_output_stops_the_rerun_there() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ran();
    env.write("src.txt", "HELLO\n");
    env.ok(&["run", "three.yaml"]);
    assert_eq!(env.ran(), ["other", "upper"], "count's input has the same content as before");
}

#[test]
fn an_edited_stage_reruns_with_what_changed_behind_it_and_going_back_costs_nothing() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ran();
    env.write("three.yaml", &THREE.replace("tr a-z A-Z", "tr a-y A-Y"));
    env.ok(&["run", "three.yaml"]);
    assert_eq!(env.ran(), ["upper"], "the text has no z, so count sees the same");
    env.write("three.yaml", &THREE.replace("tr a-z A-Z", "tr -d l"));
    env.ok(&["run", "three.yaml"]);
    assert_eq!(env.ran(), ["count", "upper"]);
    env.write("three.yaml", THREE);
    env.ok(&["run", "three.yaml"]);
    assert!(env.ran().is_empty());
    assert_eq!(env.read("out/three/count/count.txt").trim(), "6");
}

#[test]
fn plan_gives_the_reason_for_each_stage() {
    let env = three();
    let plan = env.ok(&["plan", "three.yaml"]).stdout;
    assert!(plan.contains("never ran"), "{plan}");
    assert!(plan.contains("maybe") || plan.contains("waits"), "{plan}");
    env.ok(&["run", "three.yaml"]);
    env.write("src.txt", "changed\n");
    let plan = env.ok(&["plan", "three.yaml"]).stdout;
    assert!(plan.contains("input `text` changed"), "{plan}");
    assert!(env.ok(&["run", "three.yaml", "--dry-run"]).stdout.contains("input `text` changed"));
    env.ran();
    env.ok(&["plan", "three.yaml"]);
    assert!(env.ran().is_empty(), "planning runs nothing");
}

#[test]
fn explain_names_what_differs_from_the_nearest_earlier_result() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.write("three.yaml", &THREE.replace("cat ${inputs.text}", "head -c 2 ${inputs.text}"));
    let text = env.ok(&["explain", "three.yaml", "other"]).stdout;
    assert!(text.contains("with.run"), "{text}");
    let text = env.ok(&["explain", "three.yaml", "upper"]).stdout;
    assert!(text.contains("up to date"), "{text}");
}

#[test]
fn results_deleted_from_out_come_back_without_a_run() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ran();
    fs::remove_dir_all(env.path("out")).unwrap();
    env.ok(&["run", "three.yaml"]);
    assert!(env.ran().is_empty());
    assert_eq!(env.read("out/three/count/count.txt").trim(), "6");
}

#[test]
fn a_tampered_blob_is_found_and_its_stage_reruns() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ran();
    for (path, content) in env.tree(".grlm/blobs") {
        if content == b"HELLO\n" {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
            fs::write(&path, "HULLO\n").unwrap();
        }
    }
    env.ok(&["run", "three.yaml"]);
    assert_eq!(env.ran(), ["upper"]);
    assert_eq!(env.read("out/three/upper/upper.txt"), "HELLO\n");
}

#[test]
fn a_truncated_blob_is_found_too() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ran();
    for (path, content) in env.tree(".grlm/blobs") {
        if content == b"hello\n" {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
            fs::write(&path, "he").unwrap();
        }
    }
    env.ok(&["run", "three.yaml"]);
    assert_eq!(env.ran(), ["other"]);
    assert_eq!(env.read("out/three/other/other.txt"), "hello\n");
}

#[test]
fn declared_environment_is_part_of_the_key_and_passed_environment_is_not() {
    let env = three();
    env.write(
        "env.yaml",
        r#"
name: env
stages:
  show:
    uses: command
    env: [SEED]
    pass_env: [PLACE]
    with: { run: "echo show >> journal; echo $SEED $PLACE > ${outputs.out}" }
    outputs: { out: show.txt }
"#,
    );
    let run = |seed: &str, place: &str| {
        let output = env.command(&["run", "env.yaml"]).env("SEED", seed).env("PLACE", place).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        (env.ran().len(), env.read("out/env/show/show.txt"))
    };
    assert_eq!(run("1", "here"), (1, "1 here\n".into()));
    assert_eq!(run("1", "there"), (0, "1 here\n".into()));
    assert_eq!(run("2", "there"), (1, "2 there\n".into()));
}

#[test]
fn declared_code_is_hashed_like_an_input() {
    let env = three();
    env.write("scripts/check.sh", "echo one");
    env.write(
        "code.yaml",
        r#"
name: code
stages:
  check:
    uses: command
    code: [scripts/check.sh]
    with: { run: "echo check >> journal; sh scripts/check.sh > ${outputs.out}" }
    outputs: { out: check.txt }
"#,
    );
    env.ok(&["run", "code.yaml"]);
    assert_eq!(env.ran(), ["check"]);
    env.write("scripts/check.sh", "echo two");
    env.ok(&["run", "code.yaml"]);
    assert_eq!(env.ran(), ["check"]);
    assert_eq!(env.read("out/code/check/check.txt"), "two\n");
}

#[test]
fn accept_adopts_a_result_and_the_record_says_so() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ran();
    env.write("three.yaml", &THREE.replace("tr a-z A-Z", "tr  a-z  A-Z"));
    let said = env.ok(&["accept", "three.yaml", "upper", "--reason", "only spacing changed"]).stdout;
    assert!(said.ends_with("  although `with.run` changed\n"), "{said}");
    env.ok(&["run", "three.yaml"]);
    assert!(env.ran().is_empty());
    let accepted = env
        .tree(".grlm/actions")
        .iter()
        .any(|(_, text)| String::from_utf8_lossy(text).contains("only spacing changed"));
    assert!(accepted);
}

#[test]
fn a_run_that_is_spared_tells_what_any_run_tells() {
    let env = three();
    env.write("b.txt", "bee\n");
    env.ok(&["run", "three.yaml"]);
    env.ran();
    let spared = env.ok(&["run", "three.yaml", "--message-format", "json"]).stdout;
    // Told not to look back, the loop itself decides.
    fs::remove_dir_all(env.path(".grlm/latest/whole")).unwrap();
    let decided = env.ok(&["run", "three.yaml", "--message-format", "json"]).stdout;
    let kinds = |text: &str| -> Vec<(String, String)> {
        let value = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
        let mut found: Vec<_> =
            text.lines().map(value).map(|e| (e["kind"].to_string(), e["stage"].to_string())).collect();
        found.sort();
        found
    };
    assert_eq!(kinds(&spared), kinds(&decided));
    assert_eq!(kinds(&spared).len(), 5);
    assert!(env.ran().is_empty());
}

#[test]
fn nothing_is_spared_when_anything_changed() {
    let env = three();
    let run = |arguments: &[&str]| {
        env.ok(&[&["run", "three.yaml"], arguments].concat());
        env.ran()
    };
    run(&[]);
    assert!(run(&[]).is_empty());
    env.write("src.txt", "other\n");
    assert_eq!(run(&[]), ["count", "other", "upper"], "an input");
    env.write("b.txt", "bee\n");
    assert_eq!(run(&["--set", "vars.source=b.txt"]), ["count", "other", "upper"], "an argument");
    assert!(run(&[]).is_empty());
    fs::write(env.path("out/three/upper/upper.txt"), "edited").ok();
    run(&[]);
    assert_eq!(env.read("out/three/upper/upper.txt"), "OTHER\n", "what is shown");
    fs::remove_dir_all(env.path(".grlm/actions")).unwrap();
    assert_eq!(run(&[]), ["count", "other", "upper"], "the records");
    assert_eq!(run(&["--force", "other"]), ["other"]);
    assert!(run(&[]).is_empty());
}

#[test]
fn explain_finds_the_nearest_result_in_other_pipelines_and_runs() {
    let env = three();
    let variants = "variants:\n  v: { set: { other.with.run: \"cat ${inputs.text} | cat > ${outputs.out}\" } }\n";
    env.write("three.yaml", &format!("{THREE}{variants}"));
    env.ok(&["run", "three.yaml", "--until", "other"]);
    let text = env.ok(&["explain", "three.yaml", "other", "--variant", "v"]).stdout;
    assert!(text.contains("compared with") && text.contains("of stage `other` of three, run "), "{text}");
    assert!(text.contains("with.run") && !text.contains("never ran"), "{text}");
    let text = env.ok(&["explain", "three.yaml", "other"]).stdout;
    assert!(text.contains("up to date") && !text.contains("nearest"), "there is no other: {text}");
    env.ok(&["run", "three.yaml", "--until", "other", "--variant", "v"]);
    let text = env.ok(&["explain", "three.yaml", "other"]).stdout;
    assert!(text.contains("nearest other result") && text.contains("of three@v, run "), "{text}");
    assert!(text.contains("with.run"), "{text}");
}

#[test]
fn a_quiet_run_says_its_results_and_nothing_else() {
    let env = three();
    for _ in 0..2 {
        let told = env.ok(&["run", "three.yaml", "--quiet"]);
        assert_eq!((told.stdout.as_str(), told.stderr.as_str()), ("results: out/three\n", ""));
    }
}
