//! The list of stage kinds. A new kind is its own file and one line here.

use std::{collections::BTreeMap, marker::PhantomData};

use schemars::Schema;
use serde_json::Value;

use crate::{ParamIssue, Ports, Resources, Stage, StageContext, StageError, rows::RowJob};

/// All kinds, in the order of the paper's pipeline.
macro_rules! registry {
    ($($stage:path),* $(,)?) => {
        static KINDS: &[&dyn StageKind] = &[$(&Erased::<$stage>(PhantomData)),*];
    };
}

registry! {
    crate::fetch::Fetch,
    crate::import_prompts::ImportPrompts,
    crate::synth::Synth,
    crate::import_items::ImportItems,
    crate::import_tids::ImportTids,
    crate::similarity::Similarity,
    crate::tid::Tid,
    crate::id2meta::BuildId2Meta,
    crate::sft::SftMeta2Tid,
    crate::sft::SftRec,
    crate::sft::SftCollaborative,
    crate::sft::SftMerge,
    crate::train::Train,
    crate::sasrec::Sasrec,
    crate::generate::Generate,
    crate::item_knn::ItemKnn,
    crate::popularity::Popularity,
    crate::fuse::Fuse,
    crate::evaluate::Evaluate,
    crate::command::Command,
}

include!(concat!(env!("OUT_DIR"), "/code_digests.rs"));

/// Every stage kind.
pub fn kinds() -> &'static [&'static dyn StageKind] {
    KINDS
}

/// The kind of this name.
pub fn kind(name: &str) -> Option<&'static dyn StageKind> {
    KINDS.iter().copied().find(|k| k.name() == name)
}

/// The digest, as 64 hexadecimal digits, of the code that a kind's results depend on: the token streams (comments,
/// layout and tests left out) of the modules that its own file reaches, and the locked versions of the
/// dependencies that compute. Taken when this crate was built.
pub fn code_digest(kind: &str) -> Option<&'static str> {
    CODE_DIGESTS.iter().find(|(name, _)| *name == kind).map(|(_, digest)| *digest)
}

/// Why parameters could not be read; `path` is relative to `with`.
pub type ParamError = ParamIssue;

/// A [`Stage`] with its parameter type erased: what the orchestrator works with.
pub trait StageKind: Send + Sync {
    fn name(&self) -> &'static str;
    fn summary(&self) -> &'static str;
    fn floating_point(&self) -> bool;
    fn shrinks(&self) -> bool;
    /// The JSON Schema of the parameters, with documentation and defaults.
    fn params_schema(&self) -> Schema;
    /// Reads the `with:` block, fills in defaults and checks it; returns the canonical parameters, with every
    /// default spelled out. Those are what enters the action key.
    ///
    /// # Errors
    /// Every mistake found, each with its place inside the block.
    fn resolve_params(&self, with: &Value) -> Result<Value, Vec<ParamError>>;
    /// `params` as [`StageKind::resolve_params`] returned them.
    ///
    /// # Errors
    /// As for `resolve_params`.
    fn ports(&self, params: &Value) -> Result<Ports, Vec<ParamError>>;
    /// # Errors
    /// As for `resolve_params`.
    fn resources(&self, params: &Value) -> Result<Resources, Vec<ParamError>>;
    /// As [`Stage::fitting`].
    fn fitting(&self, params: &Value, memory: u64) -> Option<String>;
    /// As [`Stage::check_ports`]; nothing, if the parameters are not as `resolve_params` returned them.
    fn check_ports(&self, params: &Value, inputs: &[&str], outputs: &[&str]) -> Vec<ParamError>;
    /// # Errors
    /// As [`Stage::plan_rows`].
    fn plan_rows(&self, params: &Value, cx: &mut StageContext) -> Result<Option<RowJob>, StageError>;
    /// # Errors
    /// As for `resolve_params`.
    fn models(&self, params: &Value) -> Result<BTreeMap<String, String>, Vec<ParamError>>;
    /// As [`Stage::secrets`]; none, if the parameters are not as `resolve_params` returned them.
    fn secrets(&self, params: &Value) -> BTreeMap<String, String>;
    /// # Errors
    /// As [`Stage::run`].
    fn run(&self, params: &Value, cx: &mut StageContext) -> Result<(), StageError>;
}

struct Erased<S>(PhantomData<S>);

impl<S: Stage> Erased<S> {
    fn parse(value: &Value) -> Result<S::Params, Vec<ParamError>> {
        let empty = Value::Object(serde_json::Map::new());
        let value = if value.is_null() { &empty } else { value };
        serde_path_to_error::deserialize(value).map_err(|e| {
            let path = e.path().to_string();
            vec![ParamIssue::new(if path == "." { String::new() } else { path }, e.into_inner().to_string())]
        })
    }
}

impl<S: Stage> StageKind for Erased<S> {
    fn name(&self) -> &'static str {
        S::KIND
    }

    fn summary(&self) -> &'static str {
        S::SUMMARY
    }

    fn shrinks(&self) -> bool {
        S::SHRINKS
    }

    fn floating_point(&self) -> bool {
        S::FLOATING_POINT
    }

    fn params_schema(&self) -> Schema {
        let mut schema = schemars::schema_for!(S::Params);
        schemars::transform::transform_subschemas(&mut shorten_default, &mut schema);
        schema
    }

    fn resolve_params(&self, with: &Value) -> Result<Value, Vec<ParamError>> {
        let params = Self::parse(with)?;
        let issues = S::check(&params);
        if !issues.is_empty() {
            return Err(issues);
        }
        serde_json::to_value(&params).map_err(|e| vec![ParamIssue::new("", e.to_string())])
    }

    fn ports(&self, params: &Value) -> Result<Ports, Vec<ParamError>> {
        Self::parse(params).map(|p| S::ports(&p))
    }

    fn resources(&self, params: &Value) -> Result<Resources, Vec<ParamError>> {
        Self::parse(params).map(|p| S::resources(&p))
    }

    fn fitting(&self, params: &Value, memory: u64) -> Option<String> {
        S::fitting(&Self::parse(params).ok()?, memory)
    }

    fn models(&self, params: &Value) -> Result<BTreeMap<String, String>, Vec<ParamError>> {
        Self::parse(params).map(|p| S::models(&p))
    }

    fn secrets(&self, params: &Value) -> BTreeMap<String, String> {
        Self::parse(params).map(|p| S::secrets(&p)).unwrap_or_default()
    }

    fn check_ports(&self, params: &Value, inputs: &[&str], outputs: &[&str]) -> Vec<ParamError> {
        Self::parse(params).map(|p| S::check_ports(&p, inputs, outputs)).unwrap_or_default()
    }

    fn plan_rows(&self, params: &Value, cx: &mut StageContext) -> Result<Option<RowJob>, StageError> {
        S::plan_rows(&Self::parse(params).map_err(in_one_line)?, cx)
    }

    fn run(&self, params: &Value, cx: &mut StageContext) -> Result<(), StageError> {
        S::run(&Self::parse(params).map_err(in_one_line)?, cx)
    }
}

/// Defaults of 32 bits are written with the digits that tell them apart, and not with those of 64.
fn shorten_default(schema: &mut Schema) {
    if let Some(default) = schema.get_mut("default") {
        shorten(default);
    }
    schemars::transform::transform_subschemas(&mut shorten_default, schema);
}

fn shorten(value: &mut Value) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(shorten),
        Value::Object(values) => values.values_mut().for_each(shorten),
        Value::Number(number) => {
            let Some(wide) = number.as_f64().filter(|_| number.is_f64()) else { return };
            let narrow = wide as f32;
            if f64::from(narrow) == wide
                && let Some(short) = narrow.to_string().parse().ok().and_then(serde_json::Number::from_f64)
            {
                *number = short;
            }
        }
        _ => {}
    }
}

fn in_one_line(issues: Vec<ParamError>) -> StageError {
    let lines: Vec<String> = issues.into_iter().map(|i| format!("`{}`: {}", i.path, i.message)).collect();
    StageError::params(lines.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_written_as_their_authors_wrote_them() {
        let schema = kind("sasrec").unwrap().params_schema().to_value();
        let default = |name: &str| schema["properties"][name]["default"].to_string();
        assert_eq!((default("temperature"), default("averaging")), ("0.08".into(), "0.998".into()));
        assert_eq!((default("lr"), default("epochs")), ("0.001".into(), "60".into()));
    }

    #[test]
    fn names_are_unique_and_every_kind_has_a_code_digest() {
        let mut seen = std::collections::HashSet::new();
        for kind in kinds() {
            assert!(seen.insert(kind.name()), "{} is listed twice", kind.name());
            assert_eq!(code_digest(kind.name()).map(str::len), Some(64), "{}", kind.name());
        }
    }
}
