//! Stage `evaluate`: rankings of any number of models against the held-out items.
//!
//! Every user of the holdout (or of its seeded sample) counts: one that a model did not rank is a miss, and how many
//! there were is reported. Whether seen items were left out is up to whoever ranked. Here: reading, matching and
//! writing; the figures are in [`metrics`], the reference's way from texts to items in [`mapping`].

use rayon::prelude::*;
use rustc_hash::FxHashMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    Artifact, Input, Output, ParamIssue, Ports, Resources, Stage, StageContext, StageError,
    artifact::{Holdout, ItemId, PerUser, Ranking, Split, UserId, jsonl, text},
    sampling::sample_users,
    threads,
};

mod groups;
pub mod mapping;
mod metrics;

use mapping::{Memory, TextMapper};
use metrics::Rank;

pub struct Evaluate;

/// How rankings become lists of items.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mapping {
    /// The rankings' own items.
    #[default]
    Fixed,
    /// Where a ranking carries `texts`, its items are found again from them by the reference's rules, fuzzy matches
    /// included; needs the input `tid2item_id`.
    Reference,
}

/// Parameters of `evaluate`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// The cut-offs K of Recall@K and NDCG@K, ascending.
    pub k: Vec<u32>,
    /// Which held-out item is the target.
    pub split: Split,
    /// How rankings become lists of items.
    pub mapping: Mapping,
    /// Evaluates a seeded sample of this many users of the holdout instead of all; `generate` with the same number
    /// and seed ranks the same users.
    pub sample_users: Option<usize>,
    /// Seed of the sample and of the bootstrap.
    pub seed: u64,
    /// Bootstrap samples behind the 95 % intervals; 0 leaves them out.
    pub bootstrap: u32,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            k: vec![1, 3, 5, 10, 20],
            split: Split::Test,
            mapping: Mapping::Fixed,
            sample_users: None,
            seed: 42,
            bootstrap: 1000,
        }
    }
}

/// Inputs that are not rankings.
const OWN_PORTS: [&str; 2] = ["holdout", "tid2item_id"];
const NO_RANKINGS: &str = "no rankings to evaluate";
const CONNECT: &str = "connect at least one model's rankings, for example `inputs: { lm: generate.rankings }`";

impl Stage for Evaluate {
    const KIND: &'static str = "evaluate";
    const SUMMARY: &'static str = "recall, NDCG and hit positions of one or more models, with intervals and by group";
    type Params = Params;

    fn ports(params: &Params) -> Ports {
        const TIDS: (&str, &str) = ("tid2item_id", "the TIDs and their items, for `mapping: reference`");
        let tids = match params.mapping {
            Mapping::Reference => Input::required(TIDS.0, Artifact::Tid2itemId, TIDS.1),
            Mapping::Fixed => Input::optional(TIDS.0, Artifact::Tid2itemId, TIDS.1),
        };
        Ports::new(
            [Input::required("holdout", Artifact::Holdout, "the users and their held-out items"), tids],
            [
                Output::new("metrics", Artifact::Metrics, "metrics.json", "the figures of each model"),
                Output::new("per_user", Artifact::PerUser, "per_user.jsonl", "where each user's target stands"),
            ],
        )
        .with_open_inputs(Artifact::Rankings)
    }

    fn resources(_: &Params) -> Resources {
        Resources::cpus(2)
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        if params.k.is_empty() || params.k.contains(&0) || !params.k.is_sorted_by(|a, b| a < b) {
            issues.push(ParamIssue::new("k", "needs one or more ascending numbers from 1").help("for example [5, 10]"));
        }
        if params.k.iter().any(|k| *k > 10_000) {
            issues.push(ParamIssue::new("k", "cut-offs beyond 10000 are not supported"));
        }
        if params.sample_users == Some(0) {
            issues.push(ParamIssue::new("sample_users", "a sample needs at least one user"));
        }
        issues
    }

    fn check_ports(_: &Params, inputs: &[&str], _outputs: &[&str]) -> Vec<ParamIssue> {
        match inputs.iter().any(|port| !OWN_PORTS.contains(port)) {
            true => Vec::new(),
            false => vec![ParamIssue::new("", NO_RANKINGS).help(CONNECT)],
        }
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let holdout = read_holdout(cx, params)?;
        let users: Vec<&Holdout> = holdout.iter().collect();
        let groups = groups::history_groups(&users);
        let mapper = read_mapper(cx, params)?;
        let models: Vec<(String, std::path::PathBuf)> = cx
            .inputs()
            .filter(|(port, _)| !OWN_PORTS.contains(port))
            .map(|(port, path)| (port.to_owned(), path.to_owned()))
            .collect();
        if models.is_empty() {
            return Err(StageError::params(NO_RANKINGS).help(CONNECT));
        }

        let pool = threads::pool(cx)?;
        let mut report = Map::new();
        let mut per_user = jsonl::Writer::create(cx.output("per_user")?)?;
        let total = models.len() as u64;
        for (done, (model, path)) in (0u64..).zip(&models) {
            cx.check_stop()?;
            cx.progress(done, total, "model");
            let rankings = read_rankings(path, params.split)?;
            let matched = match_users(path, &users, &rankings, params.split)?;
            let mut texts = rankings.iter().flat_map(|ranking| ranking.texts.iter().flatten());
            if mapper.is_some() && !rankings.is_empty() && !texts.any(|text| mapping::bracketed(text).next().is_some())
            {
                cx.warn(format!(
                    "`{model}` has no text with a TID in brackets, where `mapping: reference` looks for items: compact samples \
                     have none, and `mapping: fixed` counts the items that are ranked"
                ));
            }
            let ranks = pool.install(|| find_ranks(&users, &rankings, &matched, mapper.as_ref(), params));
            report.insert(
                model.clone(),
                Value::Object(pool.install(|| figures(&ranks, &users, &groups, &matched, params))),
            );
            let missing = matched.iter().filter(|m| m.is_none()).count();
            if missing > 0 {
                cx.warn(format!("`{model}` has no ranking for {missing} of {} users: counted as misses", users.len()));
            }
            for ((user, group), rank) in users.iter().zip(&groups).zip(&ranks) {
                per_user.write(&PerUser {
                    user: user.user.clone(),
                    model: model.clone(),
                    split: params.split,
                    rank: *rank,
                    group: Some(group.clone()),
                    domain: user.domain.clone(),
                })?;
            }
            for name in
                [format!("recall@{}", params.k[params.k.len() - 1]), format!("ndcg@{}", params.k[params.k.len() - 1])]
            {
                if let Some(value) = report[model.as_str()][&name].as_f64() {
                    cx.metric(&format!("{model}.{name}"), value, None);
                }
            }
        }
        cx.progress(total, total, "model");
        per_user.finish()?;
        write_json(cx.output("metrics")?, &Value::Object(report))
    }
}

/// The users to evaluate, in the holdout's order.
fn read_holdout(cx: &StageContext, params: &Params) -> Result<Vec<Holdout>, StageError> {
    let path = cx.input("holdout")?;
    let mut holdout: Vec<Holdout> = jsonl::read(path)?;
    if holdout.is_empty() {
        return Err(StageError::input(path, "no users are held out")
            .help("users need at least three items that all have a valid TID"));
    }
    let mut seen = FxHashMap::default();
    for (number, user) in holdout.iter().enumerate() {
        if let Some(first) = seen.insert(&user.user, number) {
            let message = format!("user `{}` of record {} stands here again", user.user.0, first + 1);
            return Err(StageError::input_at(path, number as u64 + 1, message));
        }
    }
    if let Some(count) = params.sample_users {
        let mut chosen = sample_users(holdout.iter().map(|h| &h.user), count, params.seed).into_iter();
        holdout.retain(|_| chosen.next().unwrap_or(false));
    }
    Ok(holdout)
}

fn read_mapper(cx: &StageContext, params: &Params) -> Result<Option<TextMapper>, StageError> {
    if params.mapping == Mapping::Fixed {
        return Ok(None);
    }
    let path = cx.input("tid2item_id")?;
    let entries: Map<String, Value> =
        serde_json::from_str(&text::read(path)?).map_err(|e| text::json_error(path, &e, "an object TID → items"))?;
    let entries: Result<Vec<(String, Vec<ItemId>)>, StageError> = entries
        .into_iter()
        .map(|(key, ids)| {
            let ids = serde_json::from_value(ids)
                .map_err(|e| StageError::input(path, format!("the items of `{key}` are not a list of ids: {e}")))?;
            Ok((key, ids))
        })
        .collect();
    Ok(Some(TextMapper::new(entries?)))
}

/// The rankings of one split.
fn read_rankings(path: &std::path::Path, split: Split) -> Result<Vec<Ranking>, StageError> {
    let mut rankings = Vec::new();
    for ranking in jsonl::lines::<Ranking>(path)? {
        let ranking = ranking?;
        if ranking.split == split {
            rankings.push(ranking);
        }
    }
    Ok(rankings)
}

fn target(user: &Holdout, split: Split) -> &ItemId {
    match split {
        Split::Valid => &user.valid,
        Split::Test => &user.test,
    }
}

/// For each user, the place of their ranking. Rankings of users who are not evaluated are passed over.
fn match_users(
    path: &std::path::Path,
    users: &[&Holdout],
    rankings: &[Ranking],
    split: Split,
) -> Result<Vec<Option<usize>>, StageError> {
    let mut by_user: FxHashMap<&UserId, usize> = FxHashMap::default();
    for (place, ranking) in rankings.iter().enumerate() {
        if by_user.insert(&ranking.user, place).is_some() {
            return Err(StageError::input(path, format!("user `{}` is ranked twice", ranking.user.0)));
        }
    }
    let matched: Vec<Option<usize>> = users.iter().map(|u| by_user.get(&u.user).copied()).collect();
    for (user, place) in users.iter().zip(&matched) {
        let Some(ranking) = place.map(|p| &rankings[p]) else { continue };
        if ranking.target != *target(user, split) {
            let message = format!(
                "the target of user `{}` is `{}` here and `{}` in the holdout",
                user.user.0,
                ranking.target.0,
                target(user, split).0
            );
            return Err(StageError::input(path, message)
                .help("rankings and holdout must come from the same sequences; connect the same `holdout` to both"));
        }
    }
    Ok(matched)
}

/// Each user's rank: the place of the target among the distinct items of the list.
fn find_ranks(
    users: &[&Holdout],
    rankings: &[Ranking],
    matched: &[Option<usize>],
    mapper: Option<&TextMapper>,
    params: &Params,
) -> Vec<Rank> {
    let deepest = params.k.last().copied().unwrap_or(0) as usize;
    // Each chunk has one memory; large chunks let users share what is remembered.
    let chunk = users.len().div_ceil(rayon::current_num_threads()).max(1);
    users
        .par_chunks(chunk)
        .zip(matched.par_chunks(chunk))
        .flat_map_iter(|(users, matched)| {
            let mut memory = Memory::default();
            let mut ranks = Vec::with_capacity(users.len());
            for (user, place) in users.iter().zip(matched) {
                let target = target(user, params.split);
                ranks.push(place.and_then(|p| match (mapper, &rankings[p].texts) {
                    (Some(mapper), Some(texts)) => rank_of(target, &mapper.map(texts, deepest, &mut memory)),
                    _ => rank_of(target, &rankings[p].items),
                }));
            }
            ranks
        })
        .collect()
}

fn rank_of(target: &ItemId, items: &[ItemId]) -> Rank {
    let place = items.iter().position(|item| item == target)?;
    let mut before: Vec<&ItemId> = items[..place].iter().collect();
    before.sort_unstable();
    before.dedup();
    u32::try_from(before.len() + 1).ok()
}

fn figures(
    ranks: &[Rank],
    users: &[&Holdout],
    groups: &[String],
    matched: &[Option<usize>],
    params: &Params,
) -> Map<String, Value> {
    let mut figures = metrics::at_cutoffs(ranks, &params.k);
    figures.insert("missing_users".into(), json!(matched.iter().filter(|m| m.is_none()).count()));
    figures.insert("split".into(), json!(params.split));
    figures.insert("ci95".into(), Value::Object(metrics::intervals(ranks, &params.k, params.bootstrap, params.seed)));
    figures.insert("hit_positions".into(), Value::Object(metrics::hit_positions(ranks, &params.k)));
    let by_group = metrics::by_label(ranks, groups.iter().map(|g| Some(g.as_str())), &params.k);
    figures.insert("by_group".into(), Value::Object(by_group));
    let by_domain = metrics::by_label(ranks, users.iter().map(|u| u.domain.as_deref()), &params.k);
    figures.insert("by_domain".into(), Value::Object(by_domain));
    figures
}

fn write_json(path: &std::path::Path, value: &Value) -> Result<(), StageError> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| StageError::bug(format!("metrics: {e}")))?;
    text.push('\n');
    std::fs::write(path, text).map_err(|e| StageError::io("write", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{refuses, run, run_on};

    const HOLDOUT: &str = r#"{"user":"u1","history":["a"],"valid":"b","test":"c","domain":"Books"}
{"user":"u2","history":["a","b"],"valid":"c","test":"d"}
{"user":"u3","history":["c","b","e"],"valid":"a","test":"a"}
"#;
    const RANKINGS: &str = r#"{"user":"u1","split":"test","target":"c","items":["a","a","c"],"scores":[3,2,1]}
{"user":"u1","split":"valid","target":"b","items":["b"],"scores":[3]}
{"user":"u2","split":"test","target":"d","items":["d"],"scores":[3]}
"#;

    #[test]
    fn figures_ranks_and_missing_users() {
        let ran = run("evaluate", json!({"k": [1, 2]}), &[("holdout", HOLDOUT), ("lm", RANKINGS)]).unwrap();
        let metrics = ran.json("metrics");
        // u1 at rank 2 (the repeated item counts once), u2 at rank 1, u3 not ranked.
        assert_eq!(metrics["lm"]["recall@1"], json!(1.0 / 3.0));
        assert_eq!(metrics["lm"]["recall@2"], json!(2.0 / 3.0));
        assert_eq!(metrics["lm"]["ndcg@2"], json!((1.0 + 1.0 / 3f64.log2()) / 3.0));
        assert_eq!(metrics["lm"]["users"], 3);
        assert_eq!(metrics["lm"]["missing_users"], 1);
        assert_eq!(metrics["lm"]["hit_positions"], json!({"1": 1, "2": 1}));
        assert_eq!(metrics["lm"]["by_domain"]["Books"]["recall@2"], 1.0);
        assert_eq!(metrics["lm"]["by_group"]["history 1"]["users"], 1);
        let ranks: Vec<Value> = ran.lines("per_user").iter().map(|l| l["rank"].clone()).collect();
        assert_eq!(ranks, [json!(2), json!(1), Value::Null]);
        assert_eq!(ran.logs().len(), 1);
    }

    #[test]
    fn models_stand_side_by_side_on_either_split() {
        let with = json!({"split": "valid", "k": [1], "bootstrap": 0});
        let ran = run("evaluate", with, &[("holdout", HOLDOUT), ("a", RANKINGS), ("b", RANKINGS)]).unwrap();
        assert_eq!(ran.json("metrics")["a"]["recall@1"], json!(1.0 / 3.0));
        assert_eq!(ran.json("metrics")["a"], ran.json("metrics")["b"]);
    }

    #[test]
    fn the_references_mapping_reads_the_texts() {
        let rankings =
            r#"{"user":"u1","split":"test","target":"c","items":[],"scores":[],"texts":["[x, y]","[v, w]"]}"#;
        let inputs = [("holdout", HOLDOUT), ("lm", rankings), ("tid2item_id", r#"{"x,y": ["a"], "v,w": ["c"]}"#)];
        let ran = run("evaluate", json!({"mapping": "reference", "k": [2]}), &inputs).unwrap();
        assert_eq!(ran.lines("per_user")[0]["rank"], 2);
        assert!(!ran.logs().iter().any(|line| line.contains("brackets")));
        let compact = rankings.replace("[x, y]", "x, y").replace("[v, w]", "v, w");
        let ran = run("evaluate", json!({"mapping": "reference", "k": [2]}), &[inputs[0], ("lm", &compact), inputs[2]]);
        assert!(ran.unwrap().logs().iter().any(|line| line.starts_with("`lm` has no text with a TID in brackets")));
    }

    #[test]
    fn a_sample_is_deterministic_on_any_number_of_threads() {
        let with = json!({"sample_users": 2, "seed": 5});
        let inputs = [("holdout", HOLDOUT), ("lm", RANKINGS)];
        let on = |threads| {
            let ran = run_on(threads, "evaluate", with.clone(), &inputs).unwrap();
            (ran.text("metrics"), ran.text("per_user"))
        };
        assert_eq!(on(1), on(3));
        assert_eq!(on(1).1.lines().count(), 2);
    }

    #[test]
    fn bad_input_is_refused() {
        refuses(run("evaluate", json!({}), &[("holdout", HOLDOUT)]), &["no rankings", "connect"]);
        refuses(run("evaluate", json!({}), &[("holdout", ""), ("lm", RANKINGS)]), &["no users"]);
        let twice = format!("{HOLDOUT}{}", HOLDOUT.lines().next().unwrap());
        refuses(run("evaluate", json!({}), &[("holdout", &twice), ("lm", RANKINGS)]), &["input-holdout:4", "u1"]);
        let other = RANKINGS.replace("\"target\":\"d\"", "\"target\":\"z\"");
        refuses(run("evaluate", json!({}), &[("holdout", HOLDOUT), ("lm", &other)]), &["u2", "`z`", "`d`"]);
        let cut = &RANKINGS[..RANKINGS.len() - 20];
        refuses(run("evaluate", json!({}), &[("holdout", HOLDOUT), ("lm", cut)]), &["input-lm:3"]);
        let inputs = [("holdout", HOLDOUT), ("lm", RANKINGS), ("tid2item_id", "[1]")];
        refuses(run("evaluate", json!({"mapping": "reference"}), &inputs), &["input-tid2item_id:1"]);
    }

    #[test]
    fn rankings_are_missed_when_planning() {
        assert_eq!(Evaluate::check_ports(&Params::default(), &["holdout", "tid2item_id"], &[]).len(), 1);
        assert!(Evaluate::check_ports(&Params::default(), &["holdout", "lm"], &[]).is_empty());
    }

    #[test]
    fn bad_parameters_are_found_when_planning() {
        for k in [json!([]), json!([0]), json!([5, 1]), json!([1, 1])] {
            let issues = Evaluate::check(&Params { k: serde_json::from_value(k).unwrap(), ..Params::default() });
            assert_eq!(issues[0].path, "k");
        }
    }
}
