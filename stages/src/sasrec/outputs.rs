//! What `sasrec` writes: the model, similar items, rankings, the curve, and the report of its own figures.

use std::{fs, path::Path};

use grlm_nn::sasrec::{Metrics, Model, Placement, Query, Scored};
use serde_json::{Map, Value, json};

use super::{failed, fit::Fitted, params::Params};
use crate::{
    StageContext, StageError,
    artifact::{CurvePoint, Ranking, Split, jsonl},
    leave_one_out::{Dataset, User},
    rankings,
};

pub fn write(
    params: &Params,
    dataset: &Dataset,
    fitted: &Fitted,
    pool: &rayon::ThreadPool,
    cx: &mut StageContext,
) -> Result<(), StageError> {
    let points = fitted.epochs.iter().map(|report| CurvePoint {
        step: report.step,
        epoch: report.epoch as f64,
        loss: Some(report.mean_loss),
        lr: Some(f64::from(report.learning_rate)),
        metric: report.valid.map(|v| v.ndcg),
        ..CurvePoint::default()
    });
    jsonl::write(cx.output("curve")?, points)?;
    let last = fitted.refitted.as_ref().unwrap_or(&fitted.validated);
    write_model(last, dataset, cx.output("model")?)?;
    let lines = pool.install(|| similar(&fitted.validated, dataset, params.similar));
    write_similar(&lines, cx.output("similar_items")?)?;
    write_rankings(params, dataset, fitted, pool, cx)?;
    write_report(params, dataset, fitted, pool, cx)
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
    let line = |(&anchor, list): (&u32, Vec<Scored>)| {
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

/// The model that may rank for a split: one that has not learned from its targets.
fn ranks(fitted: &Fitted, split: Split) -> &Model {
    match (split, &fitted.refitted) {
        (Split::Test, Some(refitted)) => refitted,
        _ => &fitted.validated,
    }
}

fn write_rankings(
    params: &Params,
    dataset: &Dataset,
    fitted: &Fitted,
    pool: &rayon::ThreadPool,
    cx: &mut StageContext,
) -> Result<(), StageError> {
    let splits: Vec<(Split, usize)> = params.splits.iter().map(|split| (*split, dataset.users.len())).collect();
    rankings::write(cx, &splits, |split, users| {
        let users = &dataset.users[users];
        let queries: Vec<Query> = users.iter().map(|u| u.query(split)).collect();
        let histories: Vec<&[u32]> = queries.iter().map(|q| q.history.as_slice()).collect();
        let lists = pool.install(|| ranks(fitted, split).recommend(&histories, params.top_n, params.exclude_seen));
        let one = |((user, query), list): ((&User, &Query), Vec<Scored>)| Ranking {
            user: user.id.clone(),
            split,
            target: dataset.items[query.target as usize].clone(),
            items: list.iter().map(|s| dataset.items[s.item as usize].clone()).collect(),
            scores: list.iter().map(|s| s.score).collect(),
            texts: None,
        };
        users.iter().zip(&queries).zip(lists).map(one).collect()
    })
}

/// The figures of full ranking over all items, ties at their mean rank: seen items left out and not, whatever the
/// rankings do.
fn write_report(
    params: &Params,
    dataset: &Dataset,
    fitted: &Fitted,
    pool: &rayon::ThreadPool,
    cx: &mut StageContext,
) -> Result<(), StageError> {
    let figures = |model: &Model, split: Split| -> Map<String, Value> {
        let queries: Vec<Query> = dataset.users.iter().map(|u| u.query(split)).collect();
        let figures = |exclude_seen: bool| at_cutoffs(&pool.install(|| model.place(&queries, exclude_seen)));
        Map::from_iter([("unseen_items".into(), figures(true)), ("all_items".into(), figures(false))])
    };
    let mut report = Map::new();
    report.insert("users".into(), json!(dataset.users.len()));
    report.insert("best_epoch".into(), json!(fitted.best_epoch));
    report.insert("steps".into(), json!(fitted.steps));
    let mut parts = vec![("valid", &fitted.validated, Split::Valid), ("test", &fitted.validated, Split::Test)];
    parts.extend(fitted.refitted.as_ref().map(|model| ("test_refit", model, Split::Test)));
    for (name, model, split) in parts {
        cx.check_stop()?;
        let figures = figures(model, split);
        let shown = &figures[if params.exclude_seen { "unseen_items" } else { "all_items" }];
        for (figure, value) in shown.as_object().into_iter().flatten() {
            cx.metric(&format!("{name}.{figure}"), value.as_f64().unwrap_or(0.0), None);
        }
        report.insert(name.into(), Value::Object(figures));
    }
    let path = cx.output("report")?;
    let mut text = serde_json::to_string_pretty(&report).map_err(|e| StageError::bug(e.to_string()))?;
    text.push('\n');
    fs::write(path, text).map_err(|e| StageError::io("write", path, e))
}

fn at_cutoffs(placements: &[Placement]) -> Value {
    let mut figures = Map::new();
    for k in [5, 10, 20] {
        let Metrics { recall, ndcg } = Metrics::at(k, placements);
        figures.insert(format!("recall@{k}"), json!(recall));
        figures.insert(format!("ndcg@{k}"), json!(ndcg));
    }
    Value::Object(figures)
}
