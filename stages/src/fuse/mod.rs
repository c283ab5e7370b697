//! Stage `fuse`: the rankings of two or more models become one.
//!
//! How they are combined (the rule, how deep each list is read, the weight of each model) is chosen on the validation
//! item alone; test rankings are only ever combined by what was chosen. Here: parameters, reading, writing. Lists and
//! their combination are in [`combine`], the search in [`choose`].

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    Artifact, Output, ParamIssue, Ports, Resources, Stage, StageContext, StageError,
    artifact::{Ranking, Split},
    rankings, threads,
};

mod choose;
mod combine;
mod lists;

use choose::{Chosen, Search};
use combine::{Rule, fuse};
use lists::{Corpus, Table};

pub struct Fuse;

/// How lists are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Each model adds its weight / (`rank_constant` + rank): scores do not matter, only order.
    ReciprocalRank,
    /// Each model adds its weight × its score, brought to 0 (the list's worst) … 1 (its best).
    MinMax,
    /// Each model adds its weight × the softmax of its scores over its list: right where scores are logits or
    /// log-probabilities.
    Softmax,
}

/// Which figure on the validation item decides.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    #[default]
    Ndcg,
    Recall,
}

/// Parameters of `fuse`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// The methods to choose from.
    pub methods: Vec<Method>,
    /// How many places of each list are read: the depths to choose from.
    pub depths: Vec<usize>,
    /// For `reciprocal_rank`: the constants to choose from; the larger, the flatter.
    pub rank_constants: Vec<u32>,
    /// The models' weights by input name, if they are known; only method, depth and constant are chosen then.
    pub weights: Option<std::collections::BTreeMap<String, f64>>,
    /// The figure on the validation item that is made as high as possible.
    pub objective: Objective,
    /// Its cut-off K.
    pub k: u32,
    /// Items in each fused list.
    pub top_n: usize,
    /// The held-out items to rank for. Figures of fused `valid` rankings are those that the choice was made by.
    pub splits: Vec<Split>,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            methods: vec![Method::ReciprocalRank, Method::MinMax, Method::Softmax],
            depths: vec![20, 50],
            rank_constants: vec![1, 10, 60],
            weights: None,
            objective: Objective::Ndcg,
            k: 10,
            top_n: 20,
            splits: vec![Split::Valid, Split::Test],
        }
    }
}

impl Params {
    fn rules(&self) -> Vec<Rule> {
        let of = |method: &Method| match method {
            Method::ReciprocalRank => self.rank_constants.iter().map(|&c| Rule::ReciprocalRank(c)).collect(),
            Method::MinMax => vec![Rule::MinMax],
            Method::Softmax => vec![Rule::Softmax],
        };
        self.methods.iter().flat_map(of).collect()
    }

    /// Whether anything is left to choose.
    fn is_fixed(&self) -> bool {
        self.weights.is_some() && self.rules().len() == 1 && self.depths.len() == 1
    }
}

impl Stage for Fuse {
    const KIND: &'static str = "fuse";
    const SUMMARY: &'static str = "combines the rankings of several models; weights are chosen on the validation item";
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports::new(
            [],
            [
                Output::new("rankings", Artifact::Rankings, "rankings.jsonl", "a fused list for each user and split"),
                Output::new(
                    "report",
                    Artifact::Json,
                    "report.json",
                    "what was chosen, and what it brings on validation",
                ),
            ],
        )
        .with_open_inputs(Artifact::Rankings)
    }

    fn resources(_: &Params) -> Resources {
        Resources::cpus(2)
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        let empty = [
            ("methods", params.methods.is_empty()),
            ("depths", params.depths.is_empty()),
            ("splits", params.splits.is_empty()),
            ("rank_constants", params.rank_constants.is_empty() && params.methods.contains(&Method::ReciprocalRank)),
        ];
        issues.extend(empty.into_iter().filter(|(_, e)| *e).map(|(name, _)| ParamIssue::new(name, "is empty")));
        if params.depths.contains(&0) || params.top_n == 0 || params.k == 0 {
            issues.push(ParamIssue::new("", "`depths`, `top_n` and `k` must be at least 1"));
        }
        if params.splits.iter().enumerate().any(|(i, s)| params.splits[..i].contains(s)) {
            issues.push(ParamIssue::new("splits", "a split stands twice"));
        }
        for (model, weight) in params.weights.iter().flatten() {
            if !(weight.is_finite() && *weight >= 0.0) {
                issues.push(ParamIssue::new(format!("weights.{model}"), "must be a number from 0"));
            }
        }
        issues
    }

    fn check_ports(params: &Params, inputs: &[&str], _outputs: &[&str]) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        if inputs.len() < 2 {
            issues.push(ParamIssue::new("", too_few(inputs.len())).help(CONNECT));
        }
        for name in params.weights.iter().flat_map(|weights| weights.keys()) {
            if !inputs.contains(&name.as_str()) {
                let issue = ParamIssue::new(format!("weights.{name}"), "is the weight of no input");
                issues.push(issue.help(format!("the inputs are {}", inputs.join(", "))));
            }
        }
        issues
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let inputs: Vec<(String, PathBuf)> =
            cx.inputs().map(|(name, path)| (name.to_owned(), path.to_owned())).collect();
        if inputs.len() < 2 {
            return Err(StageError::params(too_few(inputs.len())).help(CONNECT));
        }
        let weights = given_weights(params, &inputs)?;
        let corpus = Corpus::read(&inputs, cx)?;
        let pool = threads::pool(cx)?;
        let search = Search {
            rules: params.rules(),
            depths: params.depths.clone(),
            weights,
            objective: params.objective,
            k: params.k,
        };
        let valid = corpus.table(Split::Valid);
        if !params.is_fixed() {
            check_valid(valid, &inputs)?;
        }
        let chosen = pool.install(|| search.run(valid, inputs.len()));
        cx.info(match params.is_fixed() {
            true => format!("as given: {}", describe(&chosen, &inputs)),
            false => {
                format!("chosen on the validation items of {} users: {}", valid.users(), describe(&chosen, &inputs))
            }
        });
        for split in &params.splits {
            check_split(*split, corpus.table(*split), &chosen, &inputs)?;
        }
        write_rankings(params, &corpus, &chosen, &pool, cx)?;
        write_report(params, &search, &chosen, valid, &inputs, cx)
    }
}

const CONNECT: &str = "connect two or more, for example `inputs: { lm: generate.rankings, sasrec: sasrec.rankings }`";

fn too_few(rankings: usize) -> String {
    format!("{} rankings to fuse", if rankings == 0 { "no" } else { "only one" })
}

/// The weights of `params`, in the order of the inputs.
fn given_weights(params: &Params, inputs: &[(String, PathBuf)]) -> Result<Option<Vec<f64>>, StageError> {
    let Some(weights) = &params.weights else { return Ok(None) };
    if let Some(unknown) = weights.keys().find(|name| inputs.iter().all(|(input, _)| input != *name)) {
        let known: Vec<&str> = inputs.iter().map(|(name, _)| name.as_str()).collect();
        return Err(StageError::params(format!("`weights` names `{unknown}`, which is not an input"))
            .help(format!("the inputs are {}", known.join(", "))));
    }
    let weights: Vec<f64> = inputs.iter().map(|(name, _)| weights.get(name).copied().unwrap_or(0.0)).collect();
    if weights.iter().all(|w| *w == 0.0) {
        return Err(StageError::params("all `weights` are 0"));
    }
    Ok(Some(weights))
}

/// Without validation rankings of every model there is nothing to choose by.
fn check_valid(valid: &Table, inputs: &[(String, PathBuf)]) -> Result<(), StageError> {
    for (model, (_, path)) in inputs.iter().enumerate() {
        if valid.ranked_by(model) == 0 {
            return Err(StageError::input(
                path,
                "holds no rankings for the validation items, by which weights are chosen",
            )
            .help(
                "give `splits: [valid, test]` to the stage that wrote it, or `weights`, one method and one depth here",
            ));
        }
    }
    Ok(())
}

/// A model that has a weight must have lists to be weighed.
fn check_split(split: Split, table: &Table, chosen: &Chosen, inputs: &[(String, PathBuf)]) -> Result<(), StageError> {
    let name = match split {
        Split::Valid => "valid",
        Split::Test => "test",
    };
    for (model, (_, path)) in inputs.iter().enumerate() {
        if chosen.weights[model] > 0.0 && table.ranked_by(model) == 0 {
            return Err(StageError::input(path, format!("holds no rankings for the split `{name}`"))
                .help(format!("take `{name}` out of `splits` here, or add it to those of the stage that wrote it")));
        }
    }
    Ok(())
}

fn describe(chosen: &Chosen, inputs: &[(String, PathBuf)]) -> String {
    let weights: Vec<String> =
        inputs.iter().zip(&chosen.weights).map(|((name, _), weight)| format!("{name} {weight:.2}")).collect();
    format!("{} at depth {}, {}", chosen.rule, chosen.depth, weights.join(", "))
}

fn write_rankings(
    params: &Params,
    corpus: &Corpus,
    chosen: &Chosen,
    pool: &rayon::ThreadPool,
    cx: &mut StageContext,
) -> Result<(), StageError> {
    let splits: Vec<(Split, usize)> =
        params.splits.iter().map(|split| (*split, corpus.table(*split).users())).collect();
    rankings::write(cx, &splits, |split, users| {
        let table = corpus.table(split);
        let of = |user: usize| {
            let mut list = fuse(table.lists(user), chosen.rule, chosen.depth, &chosen.weights);
            list.truncate(params.top_n);
            Ranking {
                user: table.user(user).clone(),
                split,
                target: corpus.item(table.target(user)).clone(),
                items: list.iter().map(|(item, _)| corpus.item(*item).clone()).collect(),
                scores: list.iter().map(|(_, score)| *score as f32).collect(),
                texts: None,
            }
        };
        pool.install(|| users.into_par_iter().map(of).collect())
    })
}

fn write_report(
    params: &Params,
    search: &Search,
    chosen: &Chosen,
    valid: &Table,
    inputs: &[(String, PathBuf)],
    cx: &mut StageContext,
) -> Result<(), StageError> {
    let name = match params.objective {
        Objective::Ndcg => format!("ndcg@{}", params.k),
        Objective::Recall => format!("recall@{}", params.k),
    };
    let by_model = |value: &dyn Fn(usize) -> Value| -> Value {
        Value::Object(
            inputs.iter().enumerate().map(|(model, (name, _))| (name.clone(), value(model))).collect::<Map<_, _>>(),
        )
    };
    let mut report = json!({
        "method": chosen.rule.method(),
        "depth": chosen.depth,
        "weights": by_model(&|model| json!(chosen.weights[model])),
        "combinations_tried": chosen.tried,
    });
    if let Rule::ReciprocalRank(constant) = chosen.rule {
        report["rank_constant"] = json!(constant);
    }
    if let Some(fused) = chosen.value {
        report["objective"] = json!(name);
        report["valid"] = json!({
            "users": valid.users(),
            "fused": fused,
            "alone": by_model(&|model| json!((valid.ranked_by(model) > 0).then(|| search.alone(valid, model)))),
        });
        cx.metric(&format!("valid.{name}"), fused, None);
    }
    write_json(cx.output("report")?, &report)
}

fn write_json(path: &Path, value: &Value) -> Result<(), StageError> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| StageError::bug(e.to_string()))?;
    text.push('\n');
    std::fs::write(path, text).map_err(|e| StageError::io("write", path, e))
}

#[cfg(test)]
mod tests;
