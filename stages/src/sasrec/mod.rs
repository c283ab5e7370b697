//! Stage `sasrec`: self-attentive sequential recommendation on item ids, trained from scratch on the CPU.
//!
//! Its rankings are a baseline, its item embeddings give the similar items that `sft_collaborative` learns from. Here:
//! parameters, and the order of work. What may be learned from is decided in [`data`]; the model, training and ranking
//! live in `grlm_nn::sasrec`.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use grlm_nn::sasrec::{
    Activation, Advance, Architecture, Loss, Metrics, Model, Query, SasrecError, Schedule, Scoring, Session, Trainer,
    Training,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Artifact, Input, Output, ParamIssue, Ports, Resources, Stage, StageContext, StageError,
    artifact::{CurvePoint, Ranking, Split, jsonl},
    threads,
};

mod data;

use data::Dataset;

/// Users ranked between two looks at the stop flag.
const USERS: usize = 4096;
/// Time between two progress events, and between two checkpoints at the ends of epochs.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);
const SAVE_EVERY: Duration = Duration::from_secs(2);

pub struct Sasrec;

/// What next-item training minimises.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossKind {
    /// Cross-entropy over all items.
    #[default]
    Full,
    /// Cross-entropy over the target and `negatives` random items; for large catalogues.
    Sampled,
}

/// How a history's state scores an item.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScoringKind {
    /// By cosine with the item's embedding, divided by `temperature`.
    #[default]
    Cosine,
    /// By dot product, as in the original paper.
    Dot,
}

/// The non-linearity of the feed-forward blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ActivationKind {
    #[default]
    Gelu,
    Relu,
}

/// Parameters of `sasrec`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// Width of embeddings and hidden states.
    pub hidden: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Attention heads; must divide `hidden`.
    pub heads: usize,
    /// Inner width of the feed-forward blocks.
    pub feed_forward: usize,
    /// Items of a history that the model looks at: the last ones.
    pub max_length: usize,
    /// The non-linearity of the feed-forward blocks.
    pub activation: ActivationKind,
    /// How a history's state scores an item.
    pub scoring: ScoringKind,
    /// For `scoring: cosine`: lower is sharper.
    pub temperature: f32,
    /// What training minimises.
    pub loss: LossKind,
    /// For `loss: sampled`: random items a batch, shared by all its users.
    pub negatives: usize,
    /// For `loss: sampled`: take the logarithm of how often an item is drawn off its score, so that the loss estimates
    /// the full one.
    pub log_q: bool,
    /// Users in a batch.
    pub batch: usize,
    /// Adam's learning rate.
    pub lr: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Dropout on embeddings, attention outputs and feed-forward blocks.
    pub dropout: f32,
    /// Dropout on attention probabilities.
    pub attention_dropout: f32,
    /// Epochs at most.
    pub epochs: u64,
    /// Epochs between two looks at validation.
    pub evaluate_every: u64,
    /// Looks at validation without a better NDCG@10 after which training stops; the best model is kept.
    pub patience: u64,
    /// Leaves out what the user had before the target, in validation and in rankings.
    pub exclude_seen: bool,
    /// The held-out items to rank for; `valid` too where a later stage tunes on it.
    pub splits: Vec<Split>,
    /// Items in each user's list.
    pub top_n: usize,
    /// Similar items of each item.
    pub similar: usize,
    /// Seed of the parameters' first values, the order of users, dropout and negatives.
    pub seed: u64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            hidden: 64,
            layers: 2,
            heads: 1,
            feed_forward: 64,
            max_length: 50,
            activation: ActivationKind::Gelu,
            scoring: ScoringKind::Cosine,
            temperature: 0.08,
            loss: LossKind::Full,
            negatives: 512,
            log_q: false,
            batch: 256,
            lr: 1e-3,
            weight_decay: 0.0,
            dropout: 0.5,
            attention_dropout: 0.5,
            epochs: 60,
            evaluate_every: 2,
            patience: 3,
            exclude_seen: true,
            splits: vec![Split::Test],
            top_n: 50,
            similar: 20,
            seed: 42,
        }
    }
}

impl Params {
    fn architecture(&self, items: usize) -> Architecture {
        Architecture {
            items,
            hidden: self.hidden,
            layers: self.layers,
            heads: self.heads,
            feed_forward: self.feed_forward,
            max_length: self.max_length,
            activation: match self.activation {
                ActivationKind::Gelu => Activation::Gelu,
                ActivationKind::Relu => Activation::Relu,
            },
            scoring: match self.scoring {
                ScoringKind::Dot => Scoring::Dot,
                ScoringKind::Cosine => Scoring::Cosine { temperature: self.temperature },
            },
        }
    }

    fn training(&self) -> Training {
        Training {
            loss: match self.loss {
                LossKind::Full => Loss::Full,
                LossKind::Sampled => Loss::Sampled { negatives: self.negatives, log_q: self.log_q },
            },
            batch: self.batch,
            learning_rate: self.lr,
            weight_decay: self.weight_decay,
            dropout: self.dropout,
            attention_dropout: self.attention_dropout,
            seed: self.seed,
        }
    }

    fn schedule(&self) -> Schedule {
        Schedule {
            max_epochs: self.epochs,
            evaluate_every: self.evaluate_every,
            patience: self.patience,
            exclude_seen: self.exclude_seen,
        }
    }
}

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
                Output::new("model", Artifact::SasrecModel, "model", "weights, configuration and item ids"),
                Output::new(
                    "similar_items",
                    Artifact::SimilarItems,
                    "similar_items.txt",
                    "each trained item's nearest",
                ),
                Output::new("rankings", Artifact::Rankings, "rankings.jsonl", "a list for each user and split"),
                Output::new("curve", Artifact::Curve, "curve.jsonl", "loss, and NDCG@10 on validation, by epoch"),
            ],
        )
    }

    fn resources(_: &Params) -> Resources {
        Resources::cpus(2)
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let mut issues: Vec<ParamIssue> = [params.architecture(1).check(), params.training().check()]
            .into_iter()
            .filter_map(|checked| checked.err().map(|e| ParamIssue::new("", e.to_string())))
            .collect();
        let counts = [
            ("epochs", params.epochs == 0),
            ("evaluate_every", params.evaluate_every == 0),
            ("patience", params.patience == 0),
            ("top_n", params.top_n == 0),
            ("similar", params.similar == 0),
        ];
        issues.extend(
            counts.into_iter().filter(|(_, zero)| *zero).map(|(name, _)| ParamIssue::new(name, "must be at least 1")),
        );
        if params.splits.is_empty() {
            issues.push(ParamIssue::new("splits", "nothing to rank for").help("give `test`, `valid` or both"));
        }
        issues
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let dataset = data::read(cx.input("sequences")?, cx.optional_input("holdout"))?;
        let pool = threads::pool(cx)?;
        let mut session = begin(params, &dataset)?;
        resume(&mut session, cx)?;
        train(params, &mut session, &pool, cx)?;

        let points = session.reports().iter().map(|report| CurvePoint {
            step: report.step,
            epoch: report.epoch as f64,
            loss: Some(report.mean_loss),
            lr: Some(f64::from(params.lr)),
            metric: report.valid.map(|v| v.ndcg),
            ..CurvePoint::default()
        });
        jsonl::write(cx.output("curve")?, points)?;
        cx.info(format!("the model of epoch {} is the best on validation", session.best_epoch()));

        let model = session.into_model();
        write_model(&model, &dataset, cx.output("model")?)?;
        write_similar(&pool.install(|| similar(&model, &dataset, params.similar)), cx.output("similar_items")?)?;
        write_rankings(params, &model, &dataset, &pool, cx)
    }
}

fn begin(params: &Params, dataset: &Dataset) -> Result<Session, StageError> {
    let model = Model::new(params.architecture(dataset.items.len()), params.seed).map_err(failed)?;
    let trainer = Trainer::new(model, params.training(), &dataset.training).map_err(failed)?;
    let valid = dataset.users.iter().map(|u| u.query(Split::Valid)).collect();
    Ok(Session::new(trainer, params.schedule(), valid))
}

fn checkpoint(cx: &StageContext) -> PathBuf {
    cx.scratch().join("checkpoint.safetensors")
}

/// Goes on from an earlier attempt's checkpoint, if there is one and it can be used.
fn resume(session: &mut Session, cx: &mut StageContext) -> Result<(), StageError> {
    let path = checkpoint(cx);
    if !path.exists() {
        return Ok(());
    }
    match session.resume(&path) {
        Ok(true) => cx.info(format!("going on after step {}", session.place().step)),
        Ok(false) => cx.warn("the checkpoint of an earlier attempt has other settings: starting anew"),
        Err(e @ SasrecError::Format { .. }) => cx.warn(format!("starting anew: {e}")),
        Err(e) => return Err(failed(e)),
    }
    Ok(())
}

fn train(
    params: &Params,
    session: &mut Session,
    pool: &rayon::ThreadPool,
    cx: &mut StageContext,
) -> Result<(), StageError> {
    let total = params.epochs * session.steps_per_epoch() as u64;
    let (mut shown, mut saved) = (Instant::now(), Instant::now());
    loop {
        if cx.stop_flag().is_set() {
            session.save(&checkpoint(cx)).map_err(failed)?;
            return Err(StageError::Stopped);
        }
        match pool.install(|| session.advance()).map_err(failed)? {
            Advance::Finished => return Ok(()),
            Advance::Step => {}
            Advance::Epoch(report) => {
                cx.metric("loss", report.mean_loss, Some(report.step));
                if let Some(valid) = report.valid {
                    cx.metric("valid.recall@10", valid.recall, Some(report.step));
                    cx.metric("valid.ndcg@10", valid.ndcg, Some(report.step));
                }
                if saved.elapsed() >= SAVE_EVERY {
                    session.save(&checkpoint(cx)).map_err(failed)?;
                    saved = Instant::now();
                }
            }
        }
        if shown.elapsed() >= PROGRESS_EVERY {
            cx.progress(session.place().step, total, "step");
            shown = Instant::now();
        }
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

/// Weights and configuration by the engine, and the ids of items by number beside them.
fn write_model(model: &Model, dataset: &Dataset, folder: &Path) -> Result<(), StageError> {
    model.save(folder).map_err(failed)?;
    let path = folder.join("items.json");
    let ids = serde_json::to_vec(&dataset.items).map_err(|e| StageError::bug(e.to_string()))?;
    fs::write(&path, ids).map_err(|e| StageError::io("write", path, e))
}

/// Lines of `anchor top1 … topN`. Items that no training sequence holds have no learned embedding: they are neither
/// anchors nor neighbours.
fn similar(model: &Model, dataset: &Dataset, count: usize) -> Vec<Vec<String>> {
    let trained = dataset.trained_items();
    let id = |item: u32| dataset.items[item as usize].0.clone();
    let lists = model.similar(&trained, count);
    let line = |(&anchor, list): (&u32, Vec<grlm_nn::sasrec::Scored>)| {
        std::iter::once(id(anchor)).chain(list.into_iter().map(|s| id(s.item))).collect()
    };
    trained.iter().zip(lists).map(line).collect()
}

fn write_similar(lines: &[Vec<String>], path: &Path) -> Result<(), StageError> {
    let widest = lines.iter().map(|l| l.len() - 1).max().unwrap_or(0);
    let mut text = String::from("anchor");
    (1..=widest).for_each(|n| text.push_str(&format!(" top{n}")));
    text.push('\n');
    for line in lines {
        text.push_str(&line.join(" "));
        text.push('\n');
    }
    fs::write(path, text).map_err(|e| StageError::io("write", path, e))
}

fn write_rankings(
    params: &Params,
    model: &Model,
    dataset: &Dataset,
    pool: &rayon::ThreadPool,
    cx: &mut StageContext,
) -> Result<(), StageError> {
    let mut out = jsonl::Writer::create(cx.output("rankings")?)?;
    let total = (dataset.users.len() * params.splits.len()) as u64;
    let mut done = 0;
    for &split in &params.splits {
        let mut placements = Vec::with_capacity(dataset.users.len());
        for users in dataset.users.chunks(USERS) {
            cx.check_stop()?;
            let queries: Vec<Query> = users.iter().map(|u| u.query(split)).collect();
            let histories: Vec<&[u32]> = queries.iter().map(|q| q.history.as_slice()).collect();
            let lists = pool.install(|| {
                placements.extend(model.place(&queries, params.exclude_seen));
                model.recommend(&histories, params.top_n, params.exclude_seen)
            });
            for ((user, query), list) in users.iter().zip(&queries).zip(lists) {
                out.write(&Ranking {
                    user: user.id.clone(),
                    split,
                    target: dataset.items[query.target as usize].clone(),
                    items: list.iter().map(|s| dataset.items[s.item as usize].clone()).collect(),
                    scores: list.iter().map(|s| s.score).collect(),
                    texts: None,
                })?;
            }
            done += users.len() as u64;
            cx.progress(done, total, "user");
        }
        let name = if split == Split::Test { "test" } else { "valid" };
        for k in [5, 10] {
            let Metrics { recall, ndcg } = Metrics::at(k, &placements);
            cx.metric(&format!("{name}.recall@{k}"), recall, None);
            cx.metric(&format!("{name}.ndcg@{k}"), ndcg, None);
        }
    }
    out.finish()
}

#[cfg(test)]
mod tests {
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
        let whole = bench.run("sasrec", small()).unwrap();
        let expected = (whole.text("rankings"), whole.text("curve"));

        let folder = tempfile::tempdir().unwrap();
        let (input, scratch) = (folder.path().join("sequences.txt"), folder.path().join("scratch"));
        fs::write(&input, circle()).unwrap();
        fs::create_dir(&scratch).unwrap();
        let params: Params = serde_json::from_value(small()).unwrap();
        let mut attempts = 0;
        let outputs = ["model", "similar_items", "rankings", "curve"].map(|o| (o.to_owned(), folder.path().join(o)));
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
