//! Row stages through the real program: what a change costs, what a kill costs, and what does not depend on devices.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt,
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use crate::environment::{Environment, Running, unwrapped, wait_until};

/// A row stage whose program notes each row it is given.
const PIPELINE: &str = r#"
name: rows
vars: { pace: 0 }
stages:
  shout:
    uses: command
    inputs: { items: { file: items.jsonl } }
    with:
      run: |
        while IFS= read -r line; do
          printf '%s\n' "$line" >> journal
          sleep ${vars.pace}
          printf '%s\n' "$line" | sed 's/"title"/"words"/'
        done
      rows: { batch: 5, fields: [title] }
    resources: { gpus: all, cpus: 2 }
    outputs: { out: words.jsonl }
  count:
    uses: command
    inputs: { words: shout.out }
    with: { run: "wc -l < ${inputs.words} > ${outputs.out}" }
    outputs: { out: count.txt }
variants:
  other: { set: { count.with.run: "wc -c < ${inputs.words} > ${outputs.out}" } }
"#;

fn items(rows: usize, changed: &[usize]) -> String {
    let title = |n: usize| if changed.contains(&n) { format!("new title {n}") } else { format!("title {n}") };
    (0..rows).map(|n| format!("{{\"id\":\"i{n}\",\"title\":\"{}\"}}\n", title(n))).collect()
}

fn environment(rows: usize) -> Environment {
    let env = Environment::new();
    env.write("rows.yaml", PIPELINE);
    env.write("items.jsonl", &items(rows, &[]));
    env
}

/// Rows that programs were given since the last look.
fn given(env: &Environment) -> usize {
    env.ran().len()
}

#[test]
fn one_changed_item_costs_one_row_and_plan_says_so() {
    let env = environment(30);
    let plan = env.ok(&["plan", "rows.yaml"]).stdout;
    assert!(plan.contains("30 of 30 rows are missing, how long one takes is not known yet"), "{plan}");
    env.ok(&["run", "rows.yaml"]);
    assert_eq!(given(&env), 30);
    env.ok(&["run", "rows.yaml"]);
    env.ok(&["run", "rows.yaml", "--force", "shout"]);
    assert_eq!(given(&env), 0, "also a forced stage finds its rows");

    env.write("items.jsonl", &items(33, &[7]));
    let plan = env.ok(&["plan", "rows.yaml"]).stdout;
    assert!(plan.contains("4 of 33 rows are missing, about "), "{plan}");
    let json: serde_json::Value = serde_json::from_str(&env.ok(&["plan", "rows.yaml", "--json"]).stdout).unwrap();
    assert_eq!(json[0]["rows"]["missing"], 4);
    env.ok(&["run", "rows.yaml"]);
    assert_eq!(given(&env), 4);
    assert_eq!(env.read("out/rows/count/count.txt").trim(), "33");
    assert!(env.read("out/rows/shout/words.jsonl").contains(r#"{"id":"i7","words":"new title 7"}"#));

    env.write("items.jsonl", &items(30, &[]));
    env.ok(&["run", "rows.yaml"]);
    assert_eq!(given(&env), 0);
}

/// An encoder, neighbours by it (those whose titles begin with the same letter), prompts from them, an extractor.
const CHAIN: &str = r#"
name: chain
stages:
  embed:
    uses: command
    inputs: { items: { file: items.jsonl } }
    with:
      run: |
        while IFS= read -r line; do
          echo "$line" >> embedded
          echo "$line" | sed 's/"title":"\(.\).*"/"letter":"\1"/'
        done
      rows: { fields: [title], namespace: embedding }
    outputs: { out: embeddings.jsonl }
  neighbors:
    uses: command
    inputs: { embeddings: embed.out }
    code: [neighbors.awk]
    with: { run: "awk -f neighbors.awk ${inputs.embeddings} > ${outputs.out}" }
    outputs: { out: neighbors.txt }
  prompts:
    uses: command
    inputs: { neighbors: neighbors.out, items: { file: items.jsonl }, template: { file: template.txt } }
    code: [prompts.awk]
    with:
      run: "awk -f prompts.awk ${inputs.template} ${inputs.items} ${inputs.neighbors} > ${outputs.out}"
    outputs: { out: prompts.jsonl }
  extract:
    uses: command
    inputs: { prompts: prompts.out }
    with:
      run: |
        while IFS= read -r line; do
          echo "$line" >> extracted
          echo "$line" | sed 's/"prompt"/"words"/'
        done
      rows: { fields: [prompt], namespace: words }
    outputs: { out: words.jsonl }
"#;

const NEIGHBORS: &str = r#"BEGIN { FS = "\"" }
{ id[NR] = $4; letter[NR] = $8; with[$8] = with[$8] " " $4 }
END { for (n = 1; n <= NR; n++) print id[n] with[letter[n]] }
"#;

const PROMPTS: &str = r#"BEGIN { FS = "\"" }
FILENAME == ARGV[1] { template = $0; next }
FILENAME == ARGV[2] { title[$4] = $8; next }
{
  split($0, ids, " ")
  text = template ": " title[ids[1]]
  for (n = 2; n in ids; n++) text = text "; " title[ids[n]]
  printf "{\"id\":\"%s\",\"prompt\":\"%s\"}\n", ids[1], text
}
"#;

#[test]
fn a_chain_of_row_stages_computes_what_really_differs() {
    let env = Environment::new();
    env.write("chain.yaml", CHAIN);
    env.write("neighbors.awk", NEIGHBORS);
    env.write("prompts.awk", PROMPTS);
    let letters = ["a", "b", "c", "d", "e"];
    let catalogue = |rows: usize, changed: Option<(usize, &str)>| -> String {
        let title = |n: usize| match changed {
            Some((which, title)) if which == n => title.to_owned(),
            _ => format!("{}{n} thing", letters[n % letters.len()]),
        };
        (0..rows).map(|n| format!("{{\"id\":\"i{n}\",\"title\":\"{}\"}}\n", title(n))).collect()
    };
    let (mut titles_seen, mut prompts_seen) = (BTreeSet::new(), BTreeSet::new());
    let lines = |text: &str, field: &str| -> BTreeSet<String> {
        let of =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()[field].as_str().unwrap().to_owned();
        text.lines().map(of).collect()
    };
    let count = |name: &str| {
        let text = fs::read_to_string(env.path(name)).unwrap_or_default();
        let _ = fs::remove_file(env.path(name));
        text.lines().count()
    };
    // What the programs were given is what is new by a diff of the files.
    let mut run = |items: &str, template: &str| {
        env.write("items.jsonl", items);
        env.write("template.txt", template);
        env.ok(&["run", "chain.yaml"]);
        let (titles, prompts) = (lines(items, "title"), lines(&env.read("out/chain/prompts/prompts.jsonl"), "prompt"));
        let new = (titles.difference(&titles_seen).count(), prompts.difference(&prompts_seen).count());
        titles_seen.extend(titles);
        prompts_seen.extend(prompts);
        assert_eq!((count("embedded"), count("extracted")), new);
        new
    };
    let before = catalogue(25, None);
    let changed = catalogue(25, Some((7, "d7 renamed")));
    assert_eq!(run(&before, "words of"), (25, 25));
    assert_eq!(run(&before, "words of"), (0, 0), "nothing touched");
    // It leaves the neighbours of its old letter, and joins those of the new one.
    assert_eq!(run(&changed, "words of"), (1, 10), "one title changed");
    assert_eq!(run(&catalogue(30, Some((7, "d7 renamed"))), "words of"), (5, 30), "five items added");
    assert_eq!(run(&changed, "five words of"), (0, 25), "the template changed");
    assert_eq!(run(&changed, "words of"), (0, 0), "and changed back");
}

#[test]
fn the_artifact_is_the_same_on_any_devices() {
    let mut seen = Vec::new();
    for devices in ["none", "sim:1", "sim:2", "sim:8"] {
        let env = environment(40);
        env.ok(&["run", "rows.yaml", "--devices", devices]);
        assert_eq!(given(&env), 40, "{devices}");
        seen.push(env.read("out/rows/shout/words.jsonl"));
    }
    assert!(seen.iter().all(|text| *text == seen[0]));
}

fn wait_for_rows(env: &Environment, run: &mut Child, rows: usize) {
    wait_until(&format!("{rows} rows are begun"), || {
        let noted = fs::read_to_string(env.path("journal")).unwrap_or_default().lines().count();
        noted >= rows || run.try_wait().unwrap().is_some()
    });
}

#[test]
fn a_kill_costs_a_batch_a_device() {
    let (rows, kills) = (150, 10);
    let env = environment(rows);
    let arguments = ["run", "rows.yaml", "--devices", "sim:2", "--set", "vars.pace=0.004"];
    let mut computed = 0;
    for _ in 0..kills {
        // At 60 % of what is left.
        let aim = (rows - computed.min(rows)) * 6 / 10;
        let mut run = Running::start(env.command(&arguments).stderr(Stdio::null()));
        wait_for_rows(&env, &mut run, aim);
        run.kill().unwrap();
        run.wait().unwrap();
        // Its worker goes with it.
        thread::sleep(Duration::from_millis(100));
        computed += given(&env);
    }
    env.ok(&arguments);
    computed += given(&env);
    assert!((rows..=rows + 5 * 2 * kills).contains(&computed), "{computed}");
    let undisturbed = environment(rows);
    undisturbed.ok(&["run", "rows.yaml"]);
    assert_eq!(env.read("out/rows/shout/words.jsonl"), undisturbed.read("out/rows/shout/words.jsonl"));
}

#[test]
fn runs_beside_each_other_compute_each_row_once() {
    let env = environment(40);
    // Different actions over the same rows: the batch is part of the action's key and of no row's.
    let runs: Vec<Running> = (5..9)
        .map(|batch| {
            let set = format!("shout.with.rows.batch={batch}");
            let out = format!("out{batch}");
            let arguments = ["run", "rows.yaml", "--set", &set, "--set", "vars.pace=0.002", "--out", &out];
            Running::start(env.command(&arguments).stderr(Stdio::null()))
        })
        .collect();
    for mut run in runs {
        assert!(run.wait().unwrap().success());
    }
    assert_eq!(given(&env), 40);
    let words = |batch: usize| env.read(&format!("out{batch}/rows/shout/words.jsonl"));
    assert!((5..9).all(|batch| words(batch) == words(5)));
}

#[test]
fn rows_are_listed_shown_moved_and_dropped() {
    let env = environment(12);
    assert_eq!(env.grlm(&["rows", "ls"]).code, 4, "there is no store yet");
    env.ok(&["run", "rows.yaml"]);
    given(&env);
    let list: serde_json::Value = serde_json::from_str(&env.ok(&["rows", "ls", "--json"]).stdout).unwrap();
    assert_eq!((&list[0]["namespace"], &list[0]["rows"]), (&"command".into(), &12.into()));
    let table = env.ok(&["rows", "ls"]).stdout;
    assert!(table.contains("namespace") && table.contains("command"), "{table}");
    let all = env.ok(&["rows", "show", "command"]).stdout;
    assert_eq!(all.lines().count(), 12);
    let key = all.lines().next().unwrap().split_whitespace().next().unwrap();
    let one = env.ok(&["rows", "show", "command", key]).stdout;
    assert!(one.starts_with("{\"words\":\"title "), "{one}");
    assert!(env.ok(&["rows", "verify"]).stdout.contains("12 records, 0 damaged"));

    let usage = env.ok(&["du"]).stdout;
    assert!(usage.contains("rows of") && usage.contains("command"), "{usage}");
    let mut export = env.command(&["rows", "export", "rows.grlm"]);
    assert!(export.status().unwrap().success());
    // As the umask says, as of any file.
    env.write("any", "");
    let mode = |name: &str| fs::metadata(env.path(name)).unwrap().permissions().mode();
    assert_eq!(mode("rows.grlm"), mode("any"));
    fs::rename(env.path(".grlm"), env.path("old-store")).unwrap();
    env.ok(&["rows", "import", "rows.grlm"]);
    env.ok(&["run", "rows.yaml"]);
    assert_eq!(given(&env), 0, "they came with the export");
    env.ok(&["rows", "drop", "command"]);
    assert!(env.ok(&["rows", "ls"]).stdout.contains("no rows are kept"));
    env.ok(&["run", "rows.yaml", "--force", "shout"]);
    assert_eq!(given(&env), 12);
    assert!(env.fails(2, &["rows", "show", "nothing"]).contains("there are command"));
}

#[test]
fn damaged_rows_are_found_and_computed_again_alone() {
    let env = environment(20);
    env.ok(&["run", "rows.yaml"]);
    given(&env);
    let (path, mut bytes) = env.tree(".grlm/rows").into_iter().find(|(path, _)| path.extension().is_some()).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
    assert!(env.grlm(&["rows", "verify"]).stdout.contains("1 damaged"));
    env.ok(&["run", "rows.yaml", "--force", "shout"]);
    assert_eq!(given(&env), 1);
    let found = env.grlm(&["verify"]);
    assert_eq!(found.code, 6);
    assert!(found.stdout.contains("rows of command: 1 damaged, and left out"), "{}", found.stdout);
    assert!(env.ok(&["verify"]).stdout.contains("20 rows"));
    env.ok(&["rows", "compact"]);
    assert!(env.ok(&["rows", "verify"]).stdout.contains("20 records, 0 damaged"));
}

#[test]
fn mistakes_in_the_rows_block_have_their_place() {
    let env = environment(1);
    env.write("rows.yaml", &PIPELINE.replace("batch: 5", "batch: 0"));
    let said = env.fails(3, &["run", "rows.yaml"]);
    assert!(said.contains("must be at least 1") && said.contains("rows.yaml:15"), "{said}");
    env.write("rows.yaml", &PIPELINE.replace("batch: 5", "output: nothing"));
    assert!(env.fails(3, &["run", "rows.yaml"]).contains("there is no output `nothing`"));
}

#[test]
fn a_plan_says_why_rows_cannot_be_told() {
    let env = environment(3);
    let lines = [r#"{"id":"a","title":"x"}"#, r#"{"id":"a","title":"y"}"#];
    for (items, words) in [
        (lines.join("\n"), "row 2: row 1 has the same `id`, \"a\""),
        ("{\"id\":\"a\",\"title\":\n".to_owned(), "items.jsonl:1: not a valid record: EOF while parsing a value"),
    ] {
        env.write("items.jsonl", &items);
        let plan = env.ok(&["plan", "rows.yaml"]).stdout;
        assert!(plan.contains("its rows cannot be told: "), "{plan}");
        assert!(plan.contains(words), "{plan}");
    }
}

#[test]
fn a_stage_too_large_for_a_made_up_machine_is_told_that_machine() {
    let env = environment(3);
    env.write("rows.yaml", &PIPELINE.replace("gpus: all, cpus: 2", "gpus: 4, cpus: 20"));
    let text = unwrapped(&env.fails(5, &["plan", "rows.yaml", "--devices", "sim:2x80GiB"]));
    assert!(text.contains("needs 4 GPUs, and the machine has 2 GPUs"), "{text}");
    assert!(text.contains("the made-up machine: "), "{text}");
}

#[test]
fn a_kill_loses_no_answer_that_a_silent_program_gave_before() {
    let env = environment(5);
    // Undeclared, so that it is in no key: while it is there, the third row gets no answer.
    env.write("hold", "");
    let wait = "if [ -e hold ] && [ $(wc -l < journal) -eq 3 ]; then sleep 1000; fi";
    let streams = PIPELINE.replace("sleep ${vars.pace}", wait).replace("batch: 5,", "batch: 5, pass: stream,");
    env.write("rows.yaml", &streams);
    let mut run = Running::start(env.command(&["run", "rows.yaml"]).stderr(Stdio::null()));
    wait_for_rows(&env, &mut run, 3);
    wait_until("two rows are kept", || env.ok(&["rows", "ls", "--json"]).stdout.contains("\"rows\":2"));
    run.kill().unwrap();
    run.wait().unwrap();
    assert_eq!(given(&env), 3);
    fs::remove_file(env.path("hold")).unwrap();
    env.ok(&["run", "rows.yaml"]);
    assert_eq!(given(&env), 3, "two were kept");
}
