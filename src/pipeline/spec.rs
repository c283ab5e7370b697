//! The pipeline file as its author writes it: one typed struct for each block. The JSON Schema that editors use
//! comes from these types; what the names in them stand for is [`super::resolve`]'s business.

use std::{fmt, time::Duration};

use grlm_stages::Resources;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::{Map, Value};

/// A pipeline file.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "grlm pipeline")]
pub(crate) struct FileSpec {
    /// The pipeline's name: results are shown in `out/NAME`. Letters, digits, `-` and `_`.
    #[serde(default)]
    pub name: Option<String>,
    /// What the pipeline does, in a line or two.
    #[serde(default)]
    #[allow(dead_code, reason = "for readers of the file")]
    pub description: Option<String>,
    /// Another pipeline file, relative to this one, that this one is laid over: maps are merged, `null` removes,
    /// anything else replaces; a stage that names another kind replaces the stage whole.
    #[serde(default)]
    #[allow(dead_code, reason = "taken out when files are merged; stands here for the schema")]
    pub extends: Option<String>,
    /// Values that `${vars.NAME}` stands for; a `null` must be given by a variant or `--set vars.NAME=…`.
    #[serde(default)]
    #[allow(dead_code, reason = "expanded in the tree before it is typed; stands here for the schema")]
    pub vars: Map<String, Value>,
    /// The stages, by name. Their order does not matter.
    pub stages: Map<String, Value>,
    /// Named changes to the pipeline, by name.
    #[serde(default)]
    #[allow(dead_code, reason = "laid over the tree before it is typed; stands here for the schema")]
    pub variants: Map<String, Value>,
}

/// One stage.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct StageSpec {
    /// The stage's kind; `grlm stages` lists them.
    pub uses: String,
    /// What it does, in a line or two; shown where a file that it takes is missing.
    #[serde(default)]
    pub description: Option<String>,
    /// Input ports, each connected to a stage's output or to a file.
    #[serde(default)]
    pub inputs: Map<String, Value>,
    /// Parameters; `grlm stages KIND` documents them.
    #[serde(default)]
    pub with: Value,
    /// File names of the outputs, for kinds that let the pipeline declare them.
    #[serde(default)]
    pub outputs: Map<String, Value>,
    /// What one attempt needs, where it differs from the kind's own needs. Not part of the cache key.
    #[serde(default)]
    pub resources: ResourcesSpec,
    /// Longest time one attempt may take: `90s`, `10m`, `1h30m`, or a number of seconds. Not part of the cache key.
    #[serde(default)]
    pub timeout: Option<Span>,
    /// How often to try again after a failure that a retry can help. Without it: once when killed or when the machine
    /// is at fault, three times when memory ran out and batches can be made smaller. A GPU that is gone, or a share of
    /// one that was too small, does not count: the stage is started again elsewhere, or with more. Not part of the
    /// cache key.
    #[serde(default)]
    pub retries: Option<u32>,
    /// Environment variables that are passed on, and are part of the cache key.
    #[serde(default)]
    pub env: Vec<String>,
    /// Environment variables that are passed on; not part of the cache key, not recorded.
    #[serde(default)]
    pub pass_env: Vec<String>,
    /// As `pass_env`, and blanked in logs.
    #[serde(default)]
    pub secrets: Vec<String>,
    /// Files or folders of code that a `command` runs; their content is part of the cache key.
    #[serde(default)]
    pub code: Vec<String>,
}

/// `{ file: PATH }`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileInput {
    /// A file or folder, relative to the working directory unless absolute.
    pub file: String,
}

/// `{ file: NAME, may_be_empty: true }`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeclaredOutput {
    /// The file's name below the stage's folder of outputs.
    pub file: String,
    /// Whether an empty file is a valid result.
    #[serde(default)]
    pub may_be_empty: bool,
}

#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ResourcesSpec {
    /// Whole GPUs, all at once or not at all; `all` takes every one that the run may use, and the CPU where there is none.
    #[serde(default)]
    pub gpus: Option<GpuCount>,
    /// Memory needed on each GPU (`40GiB`): several stages may then share one. Without it a GPU is taken whole.
    #[serde(default)]
    pub gpu_memory: Option<Bytes>,
    /// Without `gpu_memory`: once it was measured how much the stage holds on a GPU, it takes that much and not the
    /// whole, so that several stages may share one.
    #[serde(default)]
    pub share: Option<bool>,
    /// CPU cores, at least 1.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// Host memory (`16GiB`).
    #[serde(default)]
    pub memory: Option<Bytes>,
}

/// A named change to the pipeline.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct VariantSpec {
    /// What it is for, in a line or two.
    #[serde(default)]
    pub description: Option<String>,
    /// Another variant that this one builds on.
    #[serde(default)]
    pub extends: Option<String>,
    /// New values by path; a path starts with a stage's name or `vars`. A `null` removes.
    #[serde(default)]
    pub set: Map<String, Value>,
    /// New stages, by name.
    #[serde(default)]
    pub add: Map<String, Value>,
    /// Several values by path: every combination is a cell, named as in `lr[train.with.lr=1e-4]`.
    #[serde(default)]
    pub matrix: Map<String, Value>,
}

/// A length of time, as its author writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, JsonSchema)]
#[schemars(with = "TextOrNumber")]
pub(crate) struct Span(pub Duration);

/// A size in bytes, as its author writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, JsonSchema)]
#[schemars(with = "TextOrNumber")]
pub(crate) struct Bytes(pub u64);

/// A number of GPUs, or `all`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, JsonSchema)]
#[schemars(with = "AllOrNumber")]
pub(crate) struct GpuCount(pub u32);

#[derive(JsonSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "a shape for the schema")]
enum AllOrNumber {
    All(All),
    Number(u32),
}

#[derive(JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(dead_code, reason = "a shape for the schema")]
enum All {
    All,
}

#[derive(JsonSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "a shape for the schema")]
enum TextOrNumber {
    Text(String),
    Number(f64),
}

/// `90s`, `10m`, `1h30m`, or a number of seconds; `None` if it is none of these.
pub fn read_span(text: &str) -> Option<Duration> {
    let seconds = parse_seconds(text).or_else(|| text.parse().ok())?;
    Duration::try_from_secs_f64(seconds).ok()
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const HELP: &str = "a length of time such as `90s`, `10m`, `1h30m`, or a number of seconds";
        let value = Value::deserialize(deserializer)?;
        let seconds = match &value {
            Value::Number(n) => n.as_f64(),
            Value::String(text) => parse_seconds(text),
            _ => None,
        };
        seconds
            .filter(|s| *s > 0.0)
            .and_then(|s| Duration::try_from_secs_f64(s).ok())
            .map(Self)
            .ok_or_else(|| D::Error::custom(format!("expected {HELP}, found {}", Shown(&value))))
    }
}

impl<'de> Deserialize<'de> for GpuCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let count = match &value {
            Value::String(text) if text == "all" => Some(Resources::ALL_GPUS),
            Value::Number(n) => n.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n < Resources::ALL_GPUS),
            _ => None,
        };
        let wrong = || D::Error::custom(format!("expected a number of GPUs, or `all`, found {}", Shown(&value)));
        count.map(Self).ok_or_else(wrong)
    }
}

/// `1h30m`, `90s`, `1.5h`, `500ms`.
fn parse_seconds(text: &str) -> Option<f64> {
    let mut rest = text.trim();
    let mut total = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        total += number
            * match &rest[..letters] {
                "ms" => 0.001,
                "s" => 1.0,
                "m" | "min" => 60.0,
                "h" => 3600.0,
                "d" => 86400.0,
                _ => return None,
            };
        rest = rest[letters..].trim_start();
    }
    Some(total)
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let bytes = match &value {
            Value::Number(n) => n.as_u64(),
            Value::String(text) => parse_bytes(text),
            _ => None,
        };
        bytes.map(Self).ok_or_else(|| {
            D::Error::custom(format!(
                "expected a size such as `512MiB`, `40GiB`, `16GB`, or a number of bytes, found {}",
                Shown(&value)
            ))
        })
    }
}

/// `40GiB`, `512 MiB`, `16GB`, `1024`.
pub(crate) fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().ok()?;
    let unit: u64 = match text[digits..].trim() {
        "" | "B" => 1,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        "TiB" | "T" => 1 << 40,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return None,
    };
    let bytes = number * unit as f64;
    (0.0..1e18).contains(&bytes).then_some(bytes.round() as u64)
}

/// A value in a message: short, and said in words where it is not text or a number.
pub(crate) struct Shown<'a>(pub &'a Value);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Value::Null => f.write_str("nothing"),
            Value::Bool(b) => write!(f, "`{b}`"),
            Value::Number(n) => write!(f, "`{n}`"),
            Value::String(s) if s.chars().count() > 60 => {
                write!(f, "`{}…`", s.chars().take(60).collect::<String>())
            }
            Value::String(s) => write!(f, "`{s}`"),
            Value::Array(_) => f.write_str("a list"),
            Value::Object(_) => f.write_str("a map"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time() {
        let read = |t: &str| serde_json::from_value::<Span>(Value::from(t)).ok().map(|s| s.0.as_secs_f64());
        assert_eq!(read("90s"), Some(90.0));
        assert_eq!(read("1h30m"), Some(5400.0));
        assert_eq!(read("1.5 h"), None);
        assert_eq!(read("500ms"), Some(0.5));
        for bad in ["", "0s", "ten", "10", "10x", "-5s", "1e400d"] {
            assert_eq!(read(bad), None, "{bad}");
        }
        assert_eq!(serde_json::from_value::<Span>(Value::from(2)).ok(), Some(Span(Duration::from_secs(2))));
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("40GiB"), Some(40 << 30));
        assert_eq!(parse_bytes("1.5 GB"), Some(1_500_000_000));
        assert_eq!(parse_bytes("1024"), Some(1024));
        for bad in ["", "GiB", "-1", "1e99TB", "5 apples"] {
            assert_eq!(parse_bytes(bad), None, "{bad}");
        }
    }
}
