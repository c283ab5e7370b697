//! Optima that are known beforehand, what is honest, and what is refused.

use serde_json::{Value, json};

use super::*;
use crate::testing::{refuses, run, run_on};

fn line(user: usize, split: &str, target: &str, items: &[(&str, f64)]) -> String {
    let (items, scores): (Vec<&str>, Vec<f64>) = items.iter().copied().unzip();
    json!({"user": format!("u{user}"), "split": split, "target": target, "items": items, "scores": scores}).to_string()
        + "\n"
}

/// Two models that are each right about one half of the users, and sure of it; wrong, and unsure, about the other.
fn halves(splits: &[&str]) -> (String, String) {
    let (mut a, mut b) = (String::new(), String::new());
    for split in splits {
        for user in 0..40 {
            let sure: &[(&str, f64)] = &[("hit", 9.0), ("x", 0.0), ("y", -1.0)];
            let unsure: &[(&str, f64)] = &[("p", 0.2), ("q", 0.1), ("r", 0.0)];
            let (mine, theirs) = if user % 2 == 0 { (sure, unsure) } else { (unsure, sure) };
            a += &line(user, split, "hit", mine);
            b += &line(user, split, "hit", theirs);
        }
    }
    (a, b)
}

fn first_hits(lines: &[Value], split: &str) -> usize {
    lines.iter().filter(|l| l["split"] == split && l["items"][0] == l["target"]).count()
}

#[test]
fn the_rule_that_uses_how_sure_a_model_is_wins_where_that_is_what_helps() {
    let (a, b) = halves(&["valid", "test"]);
    let with = json!({"k": 1, "objective": "recall", "top_n": 3});
    let ran = run("fuse", with, &[("a", &a), ("b", &b)]).unwrap();
    let report = ran.json("report");
    // By rank or by min-max both lists look alike; softmax alone tells the sure one.
    assert_eq!(report["method"], "softmax");
    assert_eq!(report["weights"], json!({"a": 0.5, "b": 0.5}));
    assert_eq!(report["valid"], json!({"users": 40, "fused": 1.0, "alone": {"a": 0.5, "b": 0.5}}));
    // Five rules and constants × two depths × 41 weights.
    assert_eq!(report["combinations_tried"], 5 * 2 * 41);
    let lines = ran.lines("rankings");
    assert_eq!((first_hits(&lines, "valid"), first_hits(&lines, "test")), (40, 40));
    assert!(lines.iter().all(|l| l["items"].as_array().unwrap().len() == 3));
}

#[test]
fn weights_come_from_validation_even_where_test_says_otherwise() {
    // `good` is right on validation and wrong on test; `bad` the other way round.
    let (mut good, mut bad) = (String::new(), String::new());
    for user in 0..10 {
        let right = [("hit", 2.0), ("x", 1.0)];
        let wrong = [("y", 2.0), ("z", 1.0)];
        good += &(line(user, "valid", "hit", &right) + &line(user, "test", "hit", &wrong));
        bad += &(line(user, "valid", "hit", &wrong) + &line(user, "test", "hit", &right));
    }
    let with = json!({"methods": ["reciprocal_rank"], "k": 1});
    let ran = run("fuse", with, &[("good", &good), ("bad", &bad)]).unwrap();
    let report = ran.json("report");
    assert!(report["weights"]["good"].as_f64() > report["weights"]["bad"].as_f64(), "{report}");
    let lines = ran.lines("rankings");
    assert_eq!((first_hits(&lines, "valid"), first_hits(&lines, "test")), (10, 0));
}

#[test]
fn reciprocal_ranks_add_up_as_published() {
    let a = line(0, "test", "c", &[("a", 3.0), ("b", 2.0), ("c", 1.0)]);
    let b = line(0, "test", "c", &[("c", 9.0), ("b", 8.0), ("b", 7.0)]);
    let with = json!({"methods": ["reciprocal_rank"], "rank_constants": [60], "depths": [20],
                      "weights": {"a": 1.0, "b": 2.0}, "splits": ["test"]});
    let ran = run("fuse", with, &[("a", &a), ("b", &b)]).unwrap();
    let lines = ran.lines("rankings");
    assert_eq!(lines[0]["items"], json!(["c", "b", "a"]), "the repeated item counts once");
    for (got, wanted) in lines[0]["scores"].as_array().unwrap().iter().zip([
        1.0 / 63.0 + 2.0 / 61.0,
        1.0 / 62.0 + 2.0 / 62.0,
        1.0 / 61.0,
    ]) {
        assert!((got.as_f64().unwrap() - wanted).abs() < 1e-7);
    }
    assert!(ran.json("report")["valid"].is_null(), "nothing was chosen");
}

#[test]
fn depth_is_chosen_too_and_threads_change_nothing() {
    // Beyond the first place `noisy` holds only what misleads.
    let (mut noisy, mut sound) = (String::new(), String::new());
    for user in 0..12 {
        for split in ["valid", "test"] {
            let misleading: &[(&str, f64)] = &[("x", 3.0), ("y", 2.9), ("z", 2.8)];
            noisy += &line(user, split, "hit", misleading);
            sound += &line(user, split, "hit", &[("y", 1.0), ("z", 0.9), ("hit", 0.8)]);
        }
    }
    let with = json!({"methods": ["reciprocal_rank"], "rank_constants": [1], "depths": [1, 3], "k": 5,
                      "weights": {"noisy": 1.0, "sound": 1.0}});
    let inputs = [("noisy", &*noisy), ("sound", &*sound)];
    let one = run_on(1, "fuse", with.clone(), &inputs).unwrap();
    assert_eq!(one.json("report")["depth"], 3, "at depth 1 the target is in no list");
    let three = run_on(3, "fuse", with, &inputs).unwrap();
    assert_eq!((one.text("rankings"), one.text("report")), (three.text("rankings"), three.text("report")));
}

#[test]
fn users_that_one_model_lacks_are_ranked_by_the_other() {
    let (a, b) = halves(&["valid", "test"]);
    let fewer: String = b.lines().filter(|l| !l.contains("\"u7\"")).map(|l| format!("{l}\n")).collect();
    let ran = run("fuse", json!({}), &[("a", &a), ("b", &fewer)]).unwrap();
    assert_eq!(ran.lines("rankings").len(), 80);
    assert!(ran.logs().iter().any(|l| l.contains("`b` has no test ranking for 1 of 40 users")));
}

#[test]
fn bad_input_is_refused() {
    let (a, b) = halves(&["valid", "test"]);
    let (test_only, _) = halves(&["test"]);
    refuses(run("fuse", json!({}), &[("a", &a)]), &["only one", "two or more"]);
    refuses(run("fuse", json!({}), &[("a", &a), ("b", &test_only)]), &["input-b", "validation", "splits"]);
    let fixed = |splits: Value| json!({"weights": {"a": 1.0, "b": 0.5}, "methods": ["min_max"], "depths": [20], "splits": splits});
    let (valid_only, _) = halves(&["valid"]);
    let lacking = [("a", a.as_str()), ("b", valid_only.as_str())];
    refuses(run("fuse", fixed(json!(["test"])), &lacking), &["input-b", "split `test`", "splits"]);
    let given = run("fuse", fixed(json!(["test"])), &[("a", &test_only), ("b", &test_only)]).unwrap();
    assert!(given.logs().iter().any(|l| l.starts_with("as given: min_max at depth 20")), "{:?}", given.logs());
    let ports =
        |inputs: &[&str]| Fuse::check_ports(&serde_json::from_value(fixed(json!(["test"]))).unwrap(), inputs, &[]);
    assert_eq!((ports(&["a"]).len(), ports(&["a", "b"]).len(), ports(&["a", "c"]).len()), (2, 0, 1));
    refuses(run("fuse", json!({"weights": {"c": 1.0}}), &[("a", &a), ("b", &b)]), &["`c`", "a, b"]);
    refuses(run("fuse", json!({"weights": {"a": 0.0}}), &[("a", &a), ("b", &b)]), &["all `weights` are 0"]);
    refuses(
        run("fuse", json!({}), &[("a", &a), ("b", &format!("{b}{}", b.lines().next().unwrap()))]),
        &["ranked twice"],
    );
    let other = a.replace("\"target\":\"hit\"", "\"target\":\"x\"");
    refuses(run("fuse", json!({}), &[("a", &a), ("b", &other)]), &["target of user `u0`", "`hit` elsewhere"]);
    let short = a.replacen("-1.0", "", 1).replacen("0.0,]", "0.0]", 1);
    refuses(run("fuse", json!({}), &[("a", &short), ("b", &b)]), &["3 items and 2 scores"]);
    let wrong = Params { depths: vec![0], methods: Vec::new(), splits: vec![Split::Test; 2], ..Params::default() };
    assert_eq!(Fuse::check(&wrong).len(), 3);
}
