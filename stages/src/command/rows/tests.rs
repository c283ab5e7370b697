use std::{fs, path::PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    Failure, StageError,
    rows::MemoryMemo,
    testing::{Bench, Ran},
};

/// A folder where programs note the rows that they were given, and a memo that outlives attempts.
struct Desk {
    folder: TempDir,
    memo: MemoryMemo,
}

const ITEMS: &str = r#"{"id":"a","title":"red soap","price":1}
{"id":"b","title":"blue gel","price":2}
{"id":"c","title":"red soap","price":3}
"#;

impl Desk {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), memo: MemoryMemo::default() }
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// A program that notes each row and answers with `title` called `words`.
    fn shout(&self) -> String {
        format!(r#"tee -a {} | sed 's/"title"/"words"/'"#, self.log().display())
    }

    fn run(&self, run: &str, rows: Value, items: &str, devices: usize) -> Result<Ran, StageError> {
        let bench = Bench::new().input("items", items).output("out", "out.jsonl").output("failed", "failed.jsonl");
        let mut rows = rows;
        rows["failed"] = json!("failed");
        bench.memo(&self.memo).devices(devices).threads(2).run("command", json!({ "run": run, "rows": rows }))
    }

    /// Ids of the rows that programs were given since the last call.
    fn given(&self) -> Vec<String> {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let _ = fs::remove_file(self.log());
        let id = |line: &str| serde_json::from_str::<Value>(line).unwrap()["id"].as_str().unwrap().to_owned();
        let mut ids: Vec<String> = text.lines().map(id).collect();
        ids.sort();
        ids
    }
}

#[test]
fn a_program_gets_missing_rows_alone_and_its_answers_stand_in_order() {
    let desk = Desk::new();
    let ran = desk.run(&desk.shout(), json!({}), ITEMS, 0).unwrap();
    assert_eq!(desk.given(), ["a", "b", "c"]);
    let first = ran.text("out");
    assert_eq!(first.lines().next(), Some(r#"{"id":"a","words":"red soap","price":1}"#));
    assert_eq!(ran.text("failed"), "");

    assert_eq!(desk.run(&desk.shout(), json!({}), ITEMS, 2).unwrap().text("out"), first);
    assert!(desk.given().is_empty());
    let changed = ITEMS.replace("blue gel", "blue soap") + r#"{"id":"d","title":"x","price":4}"#;
    desk.run(&desk.shout(), json!({"batch": 1}), &changed, 2).unwrap();
    assert_eq!(desk.given(), ["b", "d"]);
    let reordered: Vec<&str> = ITEMS.lines().rev().collect();
    let ran = desk.run(&desk.shout(), json!({}), &reordered.join("\n"), 0).unwrap();
    assert!(desk.given().is_empty(), "a row's place is not in its key");
    assert_eq!(ran.lines("out")[0]["id"], "c");
    desk.run(&format!("{} ", desk.shout()), json!({}), ITEMS, 0).unwrap();
    assert_eq!(desk.given().len(), 3, "another text is another program");
    desk.run(&desk.shout(), json!({"version": 2}), ITEMS, 0).unwrap();
    assert_eq!(desk.given().len(), 3);
}

#[test]
fn declared_fields_are_all_that_counts_and_all_that_is_shown() {
    let desk = Desk::new();
    let rows = json!({"fields": ["title"]});
    let ran = desk.run(&desk.shout(), rows.clone(), ITEMS, 0).unwrap();
    assert_eq!(desk.given(), ["a", "b"], "rows that agree in the fields share an answer");
    assert_eq!(ran.text("out").lines().last(), Some(r#"{"id":"c","words":"red soap"}"#));
    desk.run(&desk.shout(), rows, &ITEMS.replace("\"price\":2", "\"price\":9"), 0).unwrap();
    assert!(desk.given().is_empty());
}

#[test]
fn every_way_to_pass_rows_gives_the_same_bytes_on_any_number_of_devices() {
    let items: String = (0..50).map(|n| format!("{{\"id\":{n},\"title\":\"t{n}\"}}\n")).collect();
    let mut seen = Vec::new();
    for devices in [0, 1, 3] {
        for (pass, run) in [
            ("stdin", r#"sed 's/"title"/"words"/'"#),
            ("stream", r#"while IFS= read -r line; do echo "$line" | sed 's/"title"/"words"/'; done"#),
            ("files", r#"sed 's/"title"/"words"/' "$GRLM_ROWS" > "$GRLM_ANSWERS""#),
        ] {
            let ran = Desk::new().run(run, json!({"pass": pass, "batch": 7}), &items, devices).unwrap();
            seen.push(ran.text("out"));
        }
    }
    assert_eq!(seen[0].lines().count(), 50);
    assert!(seen.iter().all(|text| *text == seen[0]));
}

#[test]
fn a_streaming_program_starts_once_a_device() {
    let desk = Desk::new();
    let items: String = (0..20).map(|n| format!("{{\"id\":{n}}}\n")).collect();
    let run = format!("echo started >> {}; while IFS= read -r line; do echo \"$line\"; done", desk.log().display());
    desk.run(&run, json!({"pass": "stream", "batch": 2}), &items, 0).unwrap();
    assert_eq!(fs::read_to_string(desk.log()).unwrap(), "started\n");
}

#[test]
fn failed_rows_are_listed_and_tried_again_alone() {
    let desk = Desk::new();
    let log = desk.log();
    let refuse = |what: &str| format!(r#"tee -a {} | sed 's/"title":"blue gel"/{what}/'"#, log.display());
    let run = refuse(r#""error":"no words""#);
    let error = desk.run(&run, json!({}), ITEMS, 0).unwrap_err();
    assert_eq!(error.failure(), Failure::FailedRows);
    assert!(error.to_string().contains(r#""b": no words"#), "{error}");
    assert_eq!(desk.given().len(), 3);
    let ran = desk.run(&run, json!({"max_failed_rows": 1}), ITEMS, 0).unwrap();
    assert_eq!(desk.given(), ["b"]);
    assert_eq!(ran.lines("failed"), [json!({"id": "b", "error": "no words"})]);
    assert_eq!(ran.lines("out").len(), 2);
    let silent = desk.run(&format!("grep -v blue; true # {}", log.display()), json!({"max_failed_rows": 1}), ITEMS, 0);
    assert_eq!(silent.unwrap().lines("failed")[0]["error"], "the program gave no answer");
}

#[test]
fn a_row_that_ends_the_program_fails_alone_and_a_broken_program_fails_the_stage() {
    let desk = Desk::new();
    let items: String = (0..40).map(|n| format!("{{\"id\":{n}}}\n")).collect();
    for poison in [0, 5, 39] {
        let run =
            format!(r#"while IFS= read -r line; do case "$line" in *:{poison}}}) exit 3;; esac; echo "$line"; done"#);
        for pass in ["stdin", "stream"] {
            let rows = json!({"pass": pass, "batch": 40, "max_failed_rows": 1});
            let ran = Desk::new().run(&run, rows, &items, 0).unwrap();
            assert_eq!(ran.lines("failed").len(), 1, "{poison} {pass}");
            assert_eq!(ran.lines("failed")[0]["id"], poison);
            assert_eq!(ran.lines("out").len(), 39);
        }
    }
    let error = desk.run("exit 7", json!({"max_failed_rows": 1000}), &items, 0).unwrap_err();
    assert_eq!((error.failure(), error.to_string().as_str()), (Failure::Command, "the command ended with status 7"));
    let error = desk.run("kill -9 $$", json!({}), &items, 0).unwrap_err();
    assert_eq!(error.failure(), Failure::Killed);
}

#[test]
fn a_line_that_a_bad_end_cut_off_is_that_rows_fault() {
    let run = "while IFS= read -r line; do case $line in *blue*) printf '{\"id\":\"b\",\"wo'; exit 1;; esac; echo \"$line\"; done";
    for (pass, batch) in [("stdin", 1), ("stdin", 3), ("stream", 1), ("stream", 3)] {
        let rows = json!({"pass": pass, "batch": batch, "max_failed_rows": 1});
        let ran = Desk::new().run(run, rows, ITEMS, 0).unwrap();
        assert_eq!(
            ran.lines("failed"),
            [json!({"id": "b", "error": "the command ended with status 1"})],
            "{pass} {batch}"
        );
        assert_eq!(ran.lines("out").len(), 2);
    }
}

#[test]
fn only_the_row_that_ended_a_program_is_tried_alone() {
    let desk = Desk::new();
    let items: String = (0..12).map(|n| format!("{{\"id\":{n}}}\n")).collect();
    // Ends the first time that it sees row 2, and from then on answers everything; each start notes itself.
    let (died, log) = (desk.folder.path().join("died"), desk.log());
    let run = format!(
        "echo start >> {log}; while IFS= read -r line; do case $line in *:2}}) if [ ! -e {died} ]; then touch {died}; exit 1; \
         fi;; esac; echo \"$line\"; done",
        log = log.display(),
        died = died.display()
    );
    let ran = desk.run(&run, json!({"batch": 4}), &items, 0).unwrap();
    assert_eq!(ran.lines("out").len(), 12);
    // The batch that it died in, row 2 alone, the row after it, and two batches more.
    assert_eq!(fs::read_to_string(log).unwrap().lines().count(), 5);
}

#[test]
fn answers_before_a_wrong_one_are_kept() {
    for pass in ["stdin", "stream", "files"] {
        let desk = Desk::new();
        let log = desk.log();
        // `${GRLM_ROWS:-/dev/stdin}` and its like: the same program for all three ways.
        let run = format!(
            "while IFS= read -r line; do echo \"$line\" >> {log}; case \"$line\" in *blue*) echo oops;; *) echo \"$line\";; \
             esac; done < ${{GRLM_ROWS:-/dev/stdin}} > ${{GRLM_ANSWERS:-/dev/stdout}}",
            log = log.display()
        );
        let error = desk.run(&run, json!({"pass": pass}), ITEMS, 0).unwrap_err();
        assert!(error.to_string().contains("no JSON object: oops"), "{pass}: {error}");
        let files = pass == "files";
        assert_eq!(error.help_text().unwrap().contains("standard output"), !files);
        desk.given();
        desk.run(&run, json!({"pass": pass}), ITEMS, 0).unwrap_err();
        assert!(!desk.given().contains(&"a".to_owned()), "{pass}: `a` was answered before");
    }
}

#[test]
fn answers_that_are_none_are_refused() {
    for (run, words) in [
        ("echo hello", "no JSON object: hello"),
        (r#"echo '{"words": 1}'"#, "has no id"),
        (r#"echo '{"id": "z"}'"#, "not asked"),
        (r#"sed 's/"id":"a"/"id":7/'"#, "not asked"),
        (r#"cat; echo '{"id": "a"}'"#, "second answer"),
    ] {
        let error = Desk::new().run(run, json!({}), ITEMS, 0).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.help_text().unwrap().contains("standard error"));
    }
}

#[test]
fn an_answer_keeps_the_type_of_its_rows_id() {
    for (items, run) in [("{\"id\":7}\n", r#"echo '{"id":"7"}'"#), ("{\"id\":\"7\"}\n", r#"echo '{"id":7}'"#)] {
        let error = Desk::new().run(run, json!({}), items, 0).unwrap_err();
        assert!(error.to_string().contains("whose id is a text where the row's is a number"), "{error}");
    }
}

#[test]
fn rows_must_be_objects_with_distinct_ids() {
    let refused = |items: &str| Desk::new().run("cat", json!({}), items, 0).unwrap_err().to_string();
    assert!(refused("[1]\n").contains("input-items:1"));
    assert!(refused("{\"x\":1}\n").contains("no field `id`"));
    assert!(refused("{\"id\":[]}\n").contains("no text and no number"));
    assert!(refused("{\"id\":1}\n{\"id\":1}\n").contains("row 2: row 1 has the same `id`, 1"));
    let ran = Desk::new().run("cat", json!({"id": "user"}), "{\"user\":7}\n", 0).unwrap();
    assert_eq!(ran.text("out"), "{\"user\":7}\n");
}

#[test]
fn mistakes_in_the_block_are_found_before_anything_runs() {
    let kind = crate::kind("command").unwrap();
    let issues = |run: &str, rows: Value, inputs: &[&str], outputs: &[&str]| -> Vec<String> {
        let with = json!({"run": run, "rows": rows});
        let said = |issues: Vec<crate::ParamIssue>| issues.into_iter().map(|i| format!("{}: {}", i.path, i.message));
        match kind.resolve_params(&with) {
            Ok(params) => said(kind.check_ports(&params, inputs, outputs)).collect(),
            Err(issues) => said(issues).collect(),
        }
    };
    let none: Vec<String> = Vec::new();
    assert_eq!(issues("p ${inputs.model}", json!({"input": "items"}), &["items", "model"], &["out"]), none);
    assert_eq!(issues("p", json!({"failed": "bad"}), &["items"], &["bad", "out"]), none);
    assert_eq!(issues("p", json!({}), &["items", "model"], &["out"]), ["rows: there are several inputs"]);
    assert_eq!(issues("p", json!({"input": "x"}), &["items"], &["out"]), ["rows.input: there is no input `x`"]);
    assert_eq!(issues("p", json!({"output": "a"}), &["i"], &["a", "b"]), ["rows: nothing would write the output `b`"]);
    assert_eq!(issues("p ${inputs.i}", json!({}), &["i"], &["a"]).len(), 1);
    assert_eq!(issues("p > ${outputs.a}", json!({}), &["i"], &["a"]).len(), 1);
    assert_eq!(issues("p", json!({"batch": 0, "namespace": "a/b", "fields": []}), &["i"], &["a"]).len(), 3);
}

#[test]
fn a_field_that_no_row_has_is_refused() {
    let desk = Desk::new();
    let error = desk.run(&desk.shout(), json!({"fields": ["titel"]}), ITEMS, 1).err().unwrap();
    assert!(error.to_string().contains("no row has the field `titel`"), "{error}");
    assert!(!desk.log().exists());
    assert!(desk.run(&desk.shout(), json!({"fields": ["title"]}), ITEMS, 1).is_ok());
}
