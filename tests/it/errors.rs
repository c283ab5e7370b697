//! Bad input: one clear error that says where, what and what to do, and nothing runs.

use std::{fs, os::unix::fs::PermissionsExt};

use crate::environment::{Environment, THREE, three};

/// Writes `text` as the pipeline, expects `run` to refuse it before anything runs, returns what was said.
fn refused(text: &str) -> String {
    let env = three();
    env.write("three.yaml", text);
    let said = env.fails(3, &["run", "three.yaml"]);
    assert!(env.ran().is_empty(), "nothing may run");
    said
}

fn assert_says(said: &str, wanted: &[&str]) {
    for text in wanted {
        assert!(said.contains(text), "`{text}` is missing from:\n{said}");
    }
}

#[test]
fn unknown_names_are_placed_and_answered_with_the_nearest() {
    assert_says(&refused(&THREE.replace("text: upper.out", "text: uper.out")), &["three.yaml:12", "uper", "upper"]);
    assert_says(&refused(&THREE.replacen("uses: command", "uses: comand", 1)), &["three.yaml:6", "comand", "command"]);
    assert_says(&refused(&THREE.replace("text: upper.out", "text: upper.ot")), &["ot", "out"]);
    assert_says(&refused(&THREE.replacen("with: { run:", "with: { rum:", 1)), &["three.yaml:8", "rum", "run"]);
    assert_says(&refused(&THREE.replacen("${vars.source}", "${vars.sorce}", 1)), &["sorce", "source"]);
    assert_says(&refused(&THREE.replacen("    outputs:", "    output:", 1)), &["output", "outputs"]);
}

#[test]
fn all_mistakes_are_told_at_once() {
    let said = refused(&THREE.replace("text: upper.out", "text: uper.out").replace("tr a-z A-Z", "tr ${vars.nope}"));
    assert_says(&said, &["uper", "nope"]);
}

#[test]
fn wrong_types_and_cycles_are_found() {
    assert_says(&refused(&THREE.replacen("stages:", "vars2: 1\nstages:", 1)), &["vars2"]);
    assert_says(
        &refused(&THREE.replacen("with: { run: \"echo other", "retries: many\n    with: { run: \"echo other", 1)),
        &["retries", "many"],
    );
    let said = refused(&THREE.replacen("{ file: \"${vars.source}\" }", "count.out", 1));
    assert_says(&said, &["wait for each other", "upper", "count"]);
}

#[test]
fn a_parameter_of_the_wrong_type_is_placed() {
    let said = refused("name: x\nstages:\n  s:\n    uses: synth\n    with: { items: many }\n");
    assert_says(&said, &["three.yaml:5", "items"]);
}

#[test]
fn missing_files_and_folders_in_their_place_are_found() {
    let env = three();
    env.write("three.yaml", &THREE.replace("src.txt", "nowhere.txt"));
    assert_says(&env.fails(3, &["run", "three.yaml"]), &["nowhere.txt", "three.yaml"]);
    fs::create_dir(env.path("folder")).unwrap();
    env.write("folder.yaml", "name: x\nstages:\n  s:\n    uses: id2meta\n    inputs: { tids: { file: folder } }\n");
    assert_says(&env.fails(3, &["run", "folder.yaml"]), &["folder", "file"]);
    assert_says(&env.fails(3, &["run", "absent.yaml"]), &["absent.yaml"]);
    assert_says(&env.fails(3, &["run", "folder"]), &["folder"]);
}

#[test]
fn an_undeclared_or_empty_output_fails_the_stage_and_publishes_nothing() {
    let env = three();
    env.write("three.yaml", &THREE.replace("> ${outputs.out}", "> /dev/null").replace(" > ${outputs.out}", ""));
    assert_says(&env.fails(1, &["run", "three.yaml", "--until", "upper"]), &["upper", "out"]);
    env.write("three.yaml", &THREE.replace("tr a-z A-Z < ${inputs.text}", "true"));
    assert_says(&env.fails(1, &["run", "three.yaml", "--until", "upper"]), &["upper", "empty"]);
    assert!(env.tree(".grlm/actions").is_empty());
    assert!(!env.path("out/three/upper").exists());
}

#[test]
fn paths_that_collide_or_leave_the_folder_are_refused() {
    assert_says(&refused(&THREE.replacen("out: upper.txt", "out: ../upper.txt", 1)), &["../upper.txt"]);
    assert_says(&refused(&THREE.replacen("out: upper.txt", "out: /tmp/upper.txt", 1)), &["/tmp/upper.txt"]);
    assert_says(
        &refused(&THREE.replacen("{ out: upper.txt }", "{ out: upper.txt, more: upper.txt }", 1)),
        &["upper.txt"],
    );
}

#[test]
fn truncated_json_is_placed() {
    let env = Environment::new();
    env.write(
        "tids.jsonl",
        "{\"id\": \"1\", \"summary_words\": [\"a\",\"b\",\"c\",\"d\",\"e\"]}\n{\"id\": \"2\", \"summ",
    );
    env.write("x.yaml", "name: x\nstages:\n  s:\n    uses: id2meta\n    inputs: { tids: { file: tids.jsonl } }\n");
    assert_says(&env.fails(1, &["run", "x.yaml"]), &["tids.jsonl:2"]);
}

#[test]
fn unknown_items_and_items_without_text_are_reported_and_under_strict_refused() {
    let env = Environment::new();
    env.write(
        "items.jsonl",
        "{\"id\": \"a\", \"title\": \"soap\"}\n{\"id\": \"b\"}\n{\"id\": \"c\", \"title\": \"comb\"}\n",
    );
    env.write("sequences.txt", "u a c a\nv a zz c a c\n");
    let pipeline = |strict: bool| {
        format!(
            "name: x\nstages:\n  s:\n    uses: import_items\n    with: {{ strict: {strict} }}\n    inputs: {{ items: {{ file: items.jsonl }}, sequences: {{ file: sequences.txt }} }}\n"
        )
    };
    env.write("x.yaml", &pipeline(false));
    let said = env.ok(&["run", "x.yaml"]).stderr;
    assert_says(&said, &["unknown", "text"]);
    env.write("x.yaml", &pipeline(true));
    assert_says(&env.fails(1, &["run", "x.yaml"]), &["items.jsonl:2"]);
}

#[test]
fn garbage_and_bombs_are_refused() {
    let env = Environment::new();
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
    for i in 1..12 {
        let refs = vec![format!("*a{}", i - 1); 9].join(", ");
        bomb.push_str(&format!("a{i}: &a{i} [{refs}]\n"));
    }
    env.write("bomb.yaml", &bomb);
    env.fails(3, &["run", "bomb.yaml"]);
    let noise: Vec<u8> = (0..50_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(env.path("noise.yaml"), noise).unwrap();
    env.fails(3, &["run", "noise.yaml"]);
    let pairs = |n: usize| format!("name: t\nstages:\n  a: {}{}\n", "[".repeat(n), "]".repeat(n));
    let braces = format!("stages: {}", "{a: ".repeat(200_000));
    // Work that grows with the square of the depth would not end before the test runner's patience does.
    for deep in ["[".repeat(5_000_000), pairs(80_000), pairs(150), braces] {
        env.write("deep.yaml", &deep);
        assert_says(&env.fails(3, &["run", "deep.yaml"]), &["nested more than 100 deep", "deep.yaml:"]);
    }
    env.write("dashes.yaml", &"- ".repeat(2_000_000));
    env.fails(3, &["run", "dashes.yaml"]);
    env.write("empty.yaml", "");
    assert_says(&env.fails(3, &["run", "empty.yaml"]), &["`empty.yaml` is empty"]);
}

#[test]
fn mistyped_stages_are_answered_with_the_nearest_or_all() {
    let env = three();
    for arguments in [
        &["plan", "three.yaml", "--until", "uper"][..],
        &["run", "three.yaml", "--only", "uper"],
        &["run", "three.yaml", "--from", "uper"],
        &["accept", "three.yaml", "uper"],
        &["explain", "three.yaml", "uper"],
    ] {
        assert_says(&env.fails(3, arguments), &["there is no stage `uper`", "did you mean `upper`?"]);
    }
    assert_says(&env.fails(3, &["plan", "three.yaml", "--until", "banana"]), &["known: count, other, upper"]);
    assert!(env.ran().is_empty());
    env.ok(&["run", "three.yaml", "--only", "upper,other"]);
    assert_eq!(env.ran(), ["other", "upper"]);
    assert_says(&env.fails(2, &["logs", "uper"]), &["no run has a log of stage `uper`", "did you mean `upper`?"]);
    assert_says(&env.fails(3, &["run", "thre.yaml"]), &["did you mean `three.yaml`?"]);
}

#[test]
fn retries_of_zero_mean_one_attempt() {
    let env = Environment::new();
    let text = |retries: &str| {
        let keys =
            format!("uses: command, with: {{ run: 'echo s >> journal; kill -9 $$; : ${{outputs.o}}' }}{retries}");
        format!("name: k\nstages:\n  s: {{ {keys}, outputs: {{ o: o }} }}\n")
    };
    env.write("k.yaml", &text(", retries: 0"));
    env.fails(1, &["run", "k.yaml"]);
    assert_eq!(env.ran(), ["s"]);
    env.write("k.yaml", &text(""));
    env.fails(1, &["run", "k.yaml"]);
    assert_eq!(env.ran(), ["s", "s"], "killed: tried once more");
}

#[test]
fn a_matrix_that_is_too_large_is_refused_whatever_is_asked_for() {
    let env = three();
    let values: Vec<String> = (0..150).map(|n| n.to_string()).collect();
    let axis = values.join(",");
    env.write(
        "three.yaml",
        &format!("{THREE}variants: {{ m: {{ matrix: {{ upper.retries: [{axis}], other.retries: [{axis}] }} }} }}\n"),
    );
    for arguments in [&["sweep", "-n", "three.yaml"][..], &["variants", "three.yaml"], &["plan", "three.yaml"]] {
        assert_says(&env.fails(3, arguments), &["22500 cells", "three.yaml:20:18"]);
    }
}

#[test]
fn variants_are_listed_with_what_they_are_for() {
    let env = three();
    let variants = "variants:\n  none: { description: No other., set: { other: null } }\n  bare: {}\n";
    env.write("three.yaml", &format!("{THREE}{variants}"));
    let said = env.ok(&["variants", "three.yaml"]).stdout;
    let lines: Vec<Vec<&str>> = said.lines().map(|l| l.splitn(2, ' ').map(str::trim).collect()).collect();
    assert_eq!(lines, [vec!["default", "The pipeline as written."], vec!["none", "No other."], vec!["bare"]]);
}

#[test]
fn a_store_of_a_newer_version_is_refused() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.write(".grlm/VERSION", "999\n");
    assert_says(&env.fails(4, &["run", "three.yaml"]), &["999", "newer"]);
}

#[test]
fn a_read_only_store_serves_what_it_has_and_refuses_the_rest() {
    let env = three();
    env.ok(&["run", "three.yaml"]);
    env.ran();
    // Root ignores permission bits; a file where a folder is expected stops everybody.
    let blocked = env.path("blocked");
    fs::write(&blocked, "").unwrap();
    assert_says(&env.fails(4, &["run", "three.yaml", "--store", "blocked"]), &["blocked"]);
    if !rustix::process::geteuid().is_root() {
        fs::set_permissions(env.path(".grlm"), fs::Permissions::from_mode(0o555)).unwrap();
        env.ok(&["plan", "three.yaml"]);
        fs::set_permissions(env.path(".grlm"), fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn output_that_nobody_reads_ends_the_program_without_a_panic() {
    use std::os::unix::process::ExitStatusExt;
    let env = three();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = env.command(&["stages", "train"]).stdout(writer).output().unwrap();
    assert_eq!(output.status.signal(), Some(libc::SIGPIPE), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty());
}

/// A run goes on, and succeeds, when nobody reads what it says.
#[test]
fn a_run_into_closed_pipes_does_all_its_work() {
    let env = three();
    for arguments in [&["run", "three.yaml"][..], &["sweep", "three.yaml"], &["run", "three.yaml"]] {
        let closed = || std::io::pipe().unwrap().1;
        let status = env.command(arguments).stdout(closed()).stderr(closed()).status().unwrap();
        assert_eq!(status.code(), Some(0), "{arguments:?}");
        assert_eq!(env.read("out/three/count/count.txt"), "6\n");
    }
    let refused = env.command(&["run", "none.yaml"]).stderr(std::io::pipe().unwrap().1).status().unwrap();
    assert_eq!(refused.code(), Some(3), "the same code as with a reader");
}
