//! Stage `sasrec`: self-attentive sequential recommendation on item ids, trained from scratch on the CPU.
//!
//! Its rankings are a baseline, its item embeddings give the similar items that `sft_collaborative` learns from. Here:
//! ports, and the order of work. What may be learned from is decided in [`crate::leave_one_out`], training with its checkpoints is
//! [`fit`], what comes of it [`outputs`]; the model, training and ranking themselves live in `grlm_nn::sasrec`.

use grlm_nn::sasrec::SasrecError;

use crate::{
    Artifact, Input, Output, ParamIssue, Ports, Resources, Stage, StageContext, StageError, leave_one_out, threads,
};

mod fit;
mod outputs;
mod params;

pub use params::{ActivationKind, LossKind, LrSchedule, Params, ScoringKind};

pub struct Sasrec;

impl Stage for Sasrec {
    const KIND: &'static str = "sasrec";
    const SUMMARY: &'static str = "trains SASRec on the sequences: rankings to compare with, and similar items";
    const FLOATING_POINT: bool = true;
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports::new(
            [
                Input::required("sequences", Artifact::Sequences, "what is learned from"),
                Input::optional(
                    "holdout",
                    Artifact::Holdout,
                    "the users to rank for; without it, every user of at least three items",
                ),
            ],
            [
                Output::new(
                    "model",
                    Artifact::SasrecModel,
                    "model",
                    "weights, configuration and item ids of the model that ranks the test items",
                ),
                Output::new(
                    "similar_items",
                    Artifact::SimilarItems,
                    "similar_items.txt",
                    "each trained item's nearest; never learned from a validation item",
                ),
                Output::new("rankings", Artifact::Rankings, "rankings.jsonl", "a list for each user and split"),
                Output::new(
                    "report",
                    Artifact::Json,
                    "report.json",
                    "figures on both held-out items, seen items left out and not",
                ),
                Output::new("curve", Artifact::Curve, "curve.jsonl", "loss, and NDCG@10 on validation, by epoch"),
            ],
        )
    }

    fn resources(_: &Params) -> Resources {
        Resources::cpus(2)
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        params.check()
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let dataset = leave_one_out::read(cx.input("sequences")?, cx.optional_input("holdout"))?;
        let pool = threads::pool(cx)?;
        let fitted = fit::fit(params, &dataset, &pool, cx)?;
        outputs::write(params, &dataset, &fitted, &pool, cx)
    }
}

fn failed(error: SasrecError) -> StageError {
    match error {
        SasrecError::Config(message) => StageError::params(message),
        SasrecError::NotFinite { .. } => StageError::params(error.to_string())
            .help("a lower `lr` helps most often; a higher `temperature` too, under `scoring: cosine`"),
        SasrecError::Io { action, path, source } => StageError::io(action, path, source),
        SasrecError::Format { path, reason } => StageError::input(path, reason),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use grlm_nn::sasrec::Model;
    use serde_json::json;

    use super::*;
    use crate::{
        WorkerEvent,
        testing::{Bench, refuses, run, run_on},
    };

    /// Users who walk round a circle of 20 items, each from another place.
    fn circle() -> String {
        let line = |u: usize| {
            let items: Vec<String> = (0..5 + u % 3).map(|i| format!("i{}", (u * 7 + i) % 20)).collect();
            format!("u{u} {}\n", items.join(" "))
        };
        (0..60).map(line).collect()
    }

    fn small() -> serde_json::Value {
        json!({"hidden": 16, "feed_forward": 16, "layers": 1, "batch": 16, "lr": 0.01, "dropout": 0.1,
               "attention_dropout": 0.0, "epochs": 30, "patience": 30, "evaluate_every": 1, "top_n": 5, "similar": 3,
               "splits": ["valid", "test"]})
    }

    fn metric(events: &[WorkerEvent], wanted: &str) -> f64 {
        let value = |e: &WorkerEvent| match e {
            WorkerEvent::Metric { name, value, .. } if name == wanted => Some(*value),
            _ => None,
        };
        events.iter().rev().find_map(value).unwrap()
    }

    #[test]
    fn learns_what_follows_what_and_writes_every_output() {
        let ran = run("sasrec", small(), &[("sequences", &circle())]).unwrap();
        assert!(metric(&ran.events, "test.recall@5") > 0.9);
        let rankings = ran.lines("rankings");
        assert_eq!(rankings.len(), 120);
        assert_eq!((&rankings[0]["user"], &rankings[0]["split"]), (&json!("u0"), &json!("valid")));
        assert_eq!((&rankings[0]["target"], &rankings[60]["target"]), (&json!("i3"), &json!("i4")));
        let first_hits = rankings.iter().filter(|r| r["items"][0] == r["target"]).count();
        assert!(first_hits > 90, "{first_hits} of 120");
        for ranking in &rankings {
            assert!(ranking["scores"].as_array().unwrap().is_sorted_by(|a, b| a.as_f64() >= b.as_f64()));
        }

        let similar = ran.text("similar_items");
        let lines: Vec<Vec<&str>> = similar.lines().map(|l| l.split(' ').collect()).collect();
        assert_eq!(lines[0], ["anchor", "top1", "top2", "top3"]);
        assert_eq!(lines.len(), 21);
        assert!(lines.iter().skip(1).all(|l| l.len() == 4 && !l[1..].contains(&l[0])));
        assert!(Model::load(ran.path("model")).is_ok());
        let curve = ran.lines("curve");
        assert!(curve[0]["loss"].as_f64() > curve.last().unwrap()["loss"].as_f64());
    }

    #[test]
    fn a_refit_model_ranks_test_items_and_nothing_else() {
        let mut with = small();
        with["refit"] = json!(true);
        let inputs = [("sequences", &*circle())];
        let (plain, refit) = (run("sasrec", small(), &inputs).unwrap(), run("sasrec", with, &inputs).unwrap());
        let rankings = |ran: &crate::testing::Ran, split: &str| -> Vec<serde_json::Value> {
            ran.lines("rankings").into_iter().filter(|r| r["split"] == split).collect()
        };
        assert_eq!(rankings(&plain, "valid"), rankings(&refit, "valid"));
        assert_ne!(rankings(&plain, "test"), rankings(&refit, "test"));
        assert_eq!(plain.text("similar_items"), refit.text("similar_items"));
        let (plain, refit) = (plain.json("report"), refit.json("report"));
        assert_eq!((&plain["valid"], &plain["test"]), (&refit["valid"], &refit["test"]));
        assert!(plain["test_refit"].is_null());
        assert!(refit["test_refit"]["unseen_items"]["recall@10"].as_f64() > Some(0.9), "{refit}");
    }

    #[test]
    fn threads_change_nothing() {
        let inputs = [("sequences", &*circle())];
        let (one, three) =
            (run_on(1, "sasrec", small(), &inputs).unwrap(), run_on(3, "sasrec", small(), &inputs).unwrap());
        for port in ["rankings", "similar_items", "curve"] {
            assert_eq!(one.text(port), three.text(port));
        }
    }

    #[test]
    fn held_out_items_are_never_trained_on() {
        // `z` and `y` are only ever held out: they may be ranked, but nothing is similar to them.
        let sequences = "u1 a b c y z\nu2 a b c y z\nu3 b c a\n";
        let holdout = r#"{"user":"u2","history":["b","c"],"valid":"y","test":"z"}"#;
        let ran = run("sasrec", small(), &[("sequences", sequences), ("holdout", holdout)]).unwrap();
        let rankings = ran.lines("rankings");
        assert_eq!(rankings.len(), 2, "only the holdout's user");
        let seen = ["a", "b", "c"];
        assert!(
            rankings.iter().flat_map(|r| r["items"].as_array().unwrap()).all(|i| !seen.contains(&i.as_str().unwrap()))
        );
        assert!(!ran.text("similar_items").contains(['y', 'z']));
    }

    #[test]
    fn a_stopped_attempt_goes_on_to_the_same_result() {
        let bench = Bench::new().input("sequences", circle());
        let mut with = small();
        with["refit"] = json!(true);
        let whole = bench.run("sasrec", with.clone()).unwrap();
        let expected = (whole.text("rankings"), whole.text("curve"));

        let folder = tempfile::tempdir().unwrap();
        let (input, scratch) = (folder.path().join("sequences.txt"), folder.path().join("scratch"));
        fs::write(&input, circle()).unwrap();
        fs::create_dir(&scratch).unwrap();
        let params: Params = serde_json::from_value(with).unwrap();
        let mut attempts = 0;
        let outputs =
            ["model", "similar_items", "rankings", "report", "curve"].map(|o| (o.to_owned(), folder.path().join(o)));
        loop {
            attempts += 1;
            let stop = crate::StopFlag::default();
            let sink_stop = stop.clone();
            let mut epochs = 0;
            let mut cx = StageContext::new(
                [("sequences".to_owned(), input.clone())].into(),
                outputs.clone().into(),
                scratch.clone(),
                1,
                Vec::new(),
                stop,
                move |event| {
                    epochs += usize::from(matches!(event, WorkerEvent::Metric { name, .. } if name == "loss"));
                    if epochs == 8 {
                        sink_stop.stop();
                    }
                },
            );
            match Sasrec::run(&params, &mut cx) {
                Ok(()) => break,
                Err(StageError::Stopped) => assert!(attempts < 10),
                Err(e) => panic!("{e}"),
            }
        }
        assert!(attempts > 2, "stopped at least twice");
        let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!((read("rankings"), read("curve")), expected);
    }

    #[test]
    fn bad_input_is_refused() {
        let refused = |sequences: &str, words: &[&str]| {
            refuses(run("sasrec", small(), &[("sequences", sequences)]), words);
        };
        refused("", &["no sequence"]);
        refused("u1 a\nu2 b\n", &["no user"]);
        refused("u1 a b c\nu1 a b c\n", &["input-sequences:2", "`u1`", "line 1"]);
        refused("u1 a b c\nu2 b c a\n", &["no sequence has two training items"]);
        let holdout = "{\"user\":\"u1\",\"history\":[\"a\"],\"valid\":\"b\"";
        refuses(run("sasrec", small(), &[("sequences", &circle()), ("holdout", holdout)]), &["input-holdout:1"]);
        let wrong = Params { heads: 3, dropout: 1.0, top_n: 0, splits: Vec::new(), ..Params::default() };
        assert_eq!(Sasrec::check(&wrong).len(), 4);
    }
}
