//! A `command` that works row by row: its program gets the rows that are missing, as JSON Lines, and answers a line for
//! each.
//!
//! The rows are the lines of one input. A row's key is made of the program (its text, declared code, declared
//! variables), the content of every other input, `version`, and the row: all of it, or the `fields` that its answer
//! depends on. An answer is a JSON object that carries the row's `id`; `{"id": …, "error": "why"}` says that this row
//! has none. The output has the answers in the order of rows, each beginning with its id.

use std::collections::{HashMap, HashSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Params, program::Program};
use crate::{
    ParamIssue, StageContext, StageError,
    artifact::jsonl,
    rows::{self, RowJob, RowRecipe},
};

/// Raised when the meaning of a row's key, or what is stored for a row, changes.
const ROW_VERSION: u32 = 1;

/// The `rows` block of `command`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RowParams {
    /// The input whose lines are the rows (JSON Lines, an object a line). Needed when there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// The output that the answers are written to. Needed when there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
    /// An output for the rows that failed, `{id, error}` a line. It should be declared with `may_be_empty: true`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// The field that names a row. Every row has one of its own, and its answer carries it.
    #[serde(default = "id")]
    pub id: String,
    /// What of a row its answer depends on. The program sees these fields and the id, and rows that agree in them share
    /// one answer. Without it: the whole row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fields: Option<Vec<String>>,
    /// How the program gets rows.
    #[serde(default)]
    pub pass: Pass,
    /// To be raised when the program's answers change for a reason that grlm cannot see.
    #[serde(default = "one")]
    pub version: u64,
    /// Where results are kept: stages that run the same program may share one.
    #[serde(default = "namespace")]
    pub namespace: String,
    /// Rows that the program gets at a time, at most: what a kill may cost. Changes no row's key: after a change the
    /// stage runs again, and finds its rows.
    #[serde(default = "batch")]
    pub batch: usize,
    /// The stage fails when more rows than this do.
    #[serde(default)]
    pub max_failed_rows: usize,
}

fn id() -> String {
    "id".into()
}

fn one() -> u64 {
    1
}

fn namespace() -> String {
    "command".into()
}

fn batch() -> usize {
    64
}

/// How a program gets its rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Pass {
    /// The program is started for each batch: rows on its standard input, answers on its standard output.
    #[default]
    Stdin,
    /// The program is started once a device, which suits one that loads a model. It must flush every answer.
    Stream,
    /// The program is started for each batch: rows in the file `$GRLM_ROWS`, answers to the file `$GRLM_ANSWERS`.
    Files,
}

impl RowParams {
    pub(super) fn check(&self, run: &str) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        if self.batch == 0 {
            issues.push(ParamIssue::new("rows.batch", "must be at least 1"));
        }
        if self.id.is_empty() {
            issues.push(ParamIssue::new("rows.id", "the field has no name"));
        }
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if self.namespace.is_empty() || self.namespace.starts_with('.') || !self.namespace.chars().all(fits) {
            let issue = ParamIssue::new("rows.namespace", format!("`{}` is not a namespace", self.namespace));
            issues.push(issue.help("letters, digits, `.`, `_` and `-`; it names a folder"));
        }
        if self.fields.as_ref().is_some_and(Vec::is_empty) {
            issues.push(ParamIssue::new("rows.fields", "an answer that depends on nothing needs no rows"));
        }
        if run.contains("${outputs.") {
            let issue = ParamIssue::new("run", "a program that works row by row writes no outputs itself");
            issues.push(issue.help("it answers a line for each row, and the output is made of the answers"));
        }
        issues
    }

    pub(super) fn check_ports(&self, run: &str, inputs: &[&str], outputs: &[&str]) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        let mut name = |side: &str, path: &str, named: Option<&String>, ports: &[&str]| -> Option<String> {
            match (named, ports) {
                (Some(name), ports) if ports.contains(&name.as_str()) => return Some(name.clone()),
                (Some(name), _) => {
                    issues.push(ParamIssue::new(path, format!("there is no {side} `{name}`")));
                }
                (None, [one]) => return Some((*one).to_owned()),
                (None, []) => issues.push(ParamIssue::new("rows", format!("there is no {side}"))),
                (None, several) => {
                    let list = several.iter().map(|p| format!("`{p}`")).collect::<Vec<_>>().join(", ");
                    let issue = ParamIssue::new("rows", format!("there are several {side}s"));
                    issues.push(issue.help(format!("name one of {list} as `rows.{side}`")));
                }
            }
            None
        };
        let rest: Vec<&str> = outputs.iter().copied().filter(|o| Some(*o) != self.failed.as_deref()).collect();
        let input = name("input", "rows.input", self.input.as_ref(), inputs);
        let output = name("output", "rows.output", self.output.as_ref(), &rest);
        if let Some(failed) = &self.failed {
            name("output", "rows.failed", Some(failed), outputs);
        }
        if let Some(extra) = output.and_then(|output| rest.iter().find(|o| **o != output)) {
            issues.push(ParamIssue::new("rows", format!("nothing would write the output `{extra}`")));
        }
        if let Some(input) = input
            && run.contains(&format!("${{inputs.{input}}}"))
        {
            let issue = ParamIssue::new("run", format!("the program gets the rows of `{input}`, not the file"));
            issues.push(issue.help("an answer that depends on other rows cannot be kept by row"));
        }
        issues
    }

    fn input<'a>(&'a self, cx: &'a StageContext) -> Result<&'a str, StageError> {
        match &self.input {
            Some(name) => Ok(name),
            None => cx.inputs().next().map(|(name, _)| name).ok_or_else(|| StageError::params("there is no input")),
        }
    }

    fn output(&self, cx: &StageContext) -> Result<String, StageError> {
        let mut others = cx.outputs().map(|(name, _)| name).filter(|name| Some(*name) != self.failed.as_deref());
        match &self.output {
            Some(name) => Ok(name.clone()),
            None => others.next().map(str::to_owned).ok_or_else(|| StageError::params("there is no output")),
        }
    }
}

/// A row as the program sees it.
pub(super) struct Row {
    pub id: Value,
    /// One line of JSON, without its end.
    pub line: String,
}

/// The rows of the input, and the job over them.
fn read(params: &Params, rows: &RowParams, cx: &StageContext) -> Result<(Vec<Row>, RowJob), StageError> {
    let port = rows.input(cx)?;
    let path = cx.input(port)?;
    let program = match cx.program_digest() {
        Some(digest) => digest.to_owned(),
        None => blake3::hash(params.run.as_bytes()).to_hex().to_string(),
    };
    let mut recipe = RowRecipe::new("command", ROW_VERSION).number("version", rows.version).text("program", &program);
    for (other, _) in cx.inputs().filter(|(other, _)| *other != port) {
        recipe = recipe.text("input", other).text("content", &cx.input_digest(other)?);
    }
    let mut list = Vec::new();
    let mut keys = Vec::new();
    let mut seen: HashMap<String, u64> = HashMap::new();
    let mut met: HashSet<&str> = HashSet::new();
    for (number, object) in (1u64..).zip(jsonl::lines::<Map<String, Value>>(path)?) {
        let object = object?;
        let wrong = |message: String| StageError::input(path, format!("row {number}: {message}"));
        let id = match object.get(&rows.id) {
            Some(id @ (Value::String(_) | Value::Number(_))) => id.clone(),
            Some(_) => return Err(wrong(format!("`{}` is no text and no number", rows.id))),
            None => {
                let error = wrong(format!("it has no field `{}`", rows.id));
                return Err(error.help("`rows.id` names the field that tells rows apart"));
            }
        };
        if let Some(first) = seen.insert(id.to_string(), number) {
            let error = wrong(format!("row {first} has the same `{}`, {id}", rows.id));
            return Err(error.help("rows are told apart by it: give each its own, or name another field as `rows.id`"));
        }
        let (content, shown) = match &rows.fields {
            None => (Value::Object(object.clone()), object),
            Some(fields) => {
                let mut content = Map::new();
                for field in fields {
                    if object.contains_key(field) {
                        met.insert(field.as_str());
                    }
                    content.insert(field.clone(), object.get(field).cloned().unwrap_or_default());
                }
                let mut shown = Map::from_iter([(rows.id.clone(), id.clone())]);
                shown.extend(content.clone());
                (Value::Object(content), shown)
            }
        };
        keys.push(recipe.row().json("row", &content).key());
        list.push(Row { id, line: Value::Object(shown).to_string() });
    }
    let missing = |field: &&String| !list.is_empty() && !met.contains(field.as_str());
    if let Some(field) = rows.fields.iter().flatten().find(missing) {
        let message = format!("no row has the field `{field}`, which `rows.fields` names");
        return Err(
            StageError::input(path, message).help("see `rows.fields` of the stage: it names fields of the rows")
        );
    }
    let job = RowJob::new(&rows.namespace, "row", keys).batch(rows.batch).max_failed_rows(rows.max_failed_rows);
    Ok((list, job))
}

pub(super) fn plan(params: &Params, rows: &RowParams, cx: &mut StageContext) -> Result<RowJob, StageError> {
    read(params, rows, cx).map(|(_, job)| job)
}

pub(super) fn run(params: &Params, block: &RowParams, cx: &mut StageContext) -> Result<(), StageError> {
    let (list, job) = read(params, block, cx)?;
    let threads = cx.threads();
    let scratch = cx.scratch().to_owned();
    if list.is_empty() {
        cx.warn("the input has no rows");
    }
    let done = rows::run(cx, &job, |device| Program::new(&params.run, block, &list, device, threads, &scratch))?;
    if done.failures().count() == list.len() && !list.is_empty() {
        cx.warn("every row failed: there are no answers");
    }
    let mut out = jsonl::Writer::create(cx.output(&block.output(cx)?)?)?;
    let mut failed = block.failed.as_ref().map(|port| jsonl::Writer::create(cx.output(port)?)).transpose()?;
    for (row, result) in list.iter().zip(done.iter()) {
        match result {
            Ok(bytes) => {
                let answer: Map<String, Value> = serde_json::from_slice(bytes)
                    .map_err(|e| StageError::bug(format!("a kept answer is not an object: {e}")))?;
                let mut line = Map::from_iter([(block.id.clone(), row.id.clone())]);
                line.extend(answer);
                out.write(&line)?;
            }
            Err(failure) => {
                if let Some(failed) = &mut failed {
                    failed.write(&json!({ &block.id: row.id, "error": failure.message }))?;
                }
            }
        }
    }
    if let Some(failed) = failed {
        failed.finish()?;
    }
    out.finish()
}

#[cfg(test)]
mod tests;
