//! What is known of a server before it is asked: how, how often, and with which key.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Map, Value};

use crate::ParamIssue;

/// A host that takes longer to be connected to is not there.
const LONGEST_TO_CONNECT: Duration = Duration::from_secs(20);

/// How a server is asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The environment variable that holds the key; the stage must declare it.
    pub api_key_env: Option<String>,
    /// Requests that are under way at once.
    pub concurrency: usize,
    /// Seconds in which a whole answer must have come.
    pub timeout: f64,
    /// How often a request that failed is tried again.
    pub retries: u32,
    /// Further fields of each request's body, as the server knows them; `null` takes one of ours away.
    pub extra_body: Map<String, Value>,
}

impl Default for Settings {
    fn default() -> Self {
        let (concurrency, timeout, retries) = (concurrency(), timeout(), retries());
        Self { api_key_env: None, concurrency, timeout, retries, extra_body: Map::new() }
    }
}

/// What a server is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// `/chat/completions`.
    Chat,
    /// `/embeddings`.
    Embeddings,
}

/// The variable of a server's key, as [`crate::Stage::secrets`] names it; `at` is where the settings stand. What is no
/// name may be the key itself, and is told nobody.
pub fn secret(at: &str, api_key_env: Option<&str>) -> BTreeMap<String, String> {
    api_key_env
        .filter(|name| is_name(name))
        .map(|name| (format!("{at}.api_key_env"), name.to_owned()))
        .into_iter()
        .collect()
}

/// Whether it can be the name of a variable; keys mostly have a `-`.
fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Requests under way at once, where nothing is said.
pub fn concurrency() -> usize {
    8
}

/// Seconds for a whole answer, where nothing is said.
pub fn timeout() -> f64 {
    120.0
}

/// New tries, where nothing is said.
pub fn retries() -> u32 {
    5
}

/// Why a field may not stand in `extra_body`: the stage decides it, and its results are kept by what it decided, or it
/// could not read the answer.
fn decided(request: Request, path: &str, name: &str, value: &Value) -> Option<ParamIssue> {
    let is_usual = |usual: Value| value.is_null() || *value == usual;
    let (own, other) = ("the stage's own", "not of this request");
    let (why, help) = match name {
        "model" if !value.is_null() => (own, format!("name the server's model by `{path}.model`")),
        "messages" => match request {
            Request::Chat => {
                (own, "they are made of each item and of the text `tid_extraction` at the port `prompts`".to_owned())
            }
            Request::Embeddings => (other, "leave it out: the items' texts are sent as `input`".to_owned()),
        },
        "input" => match request {
            Request::Chat => (other, "leave it out: what is asked is sent as `messages`".to_owned()),
            Request::Embeddings => {
                (own, "it is the items' texts; `prefix` is what each of them begins with".to_owned())
            }
        },
        "stream" if !is_usual(false.into()) => {
            ("not to be set: an answer is read as a whole", "leave it out".to_owned())
        }
        "n" if !is_usual(1.into()) => ("not to be set: one answer is read", "leave it out".to_owned()),
        "encoding_format" if !is_usual("float".into()) => {
            ("not to be set: vectors are read as lists of numbers", "leave it out".to_owned())
        }
        _ => return None,
    };
    let issue = ParamIssue::new(format!("{path}.extra_body.{name}"), format!("`{name}` of `extra_body` is {why}"));
    Some(issue.help(help))
}

impl Settings {
    /// Mistakes in these settings of `request` and in the server's address, under `path`. Without an address, no server
    /// is asked, and settings that only make sense with one are mistakes.
    pub fn check(&self, request: Request, path: &str, address: Option<&str>) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        let mut issue = |name: &str, message: &str| issues.push(ParamIssue::new(format!("{path}.{name}"), message));
        let Some(address) = address else {
            let usual = Self::default();
            let given = [
                ("api_key_env", self.api_key_env.is_some()),
                ("extra_body", !self.extra_body.is_empty()),
                ("concurrency", self.concurrency != usual.concurrency),
                ("timeout", self.timeout != usual.timeout),
                ("retries", self.retries != usual.retries),
            ];
            for (name, _) in given.into_iter().filter(|(_, given)| *given) {
                issue(name, "is for a server: `endpoint` is missing");
            }
            return issues;
        };
        match address.split_once("://") {
            Some(("http" | "https", rest)) if rest.split('/').next().is_some_and(|host| host.contains('@')) => {
                issue("endpoint", "holds a password; name the variable of the key by `api_key_env`");
            }
            // Nothing can be appended to it, and what stands there is often a key, which would be written down.
            Some(("http" | "https", rest)) if rest.contains(['?', '#']) => {
                issue("endpoint", "ends before `?`; name the variable of a key by `api_key_env`");
            }
            Some(("http" | "https", rest)) if !rest.is_empty() => {}
            _ => issue("endpoint", "must be a URL, such as http://localhost:8000/v1"),
        }
        if self.concurrency == 0 || self.concurrency > 4096 {
            issue("concurrency", "must be from 1 to 4096");
        }
        if !(self.timeout > 0.0 && self.timeout <= 86_400.0) {
            issue("timeout", "must be above 0 and at most 86400 seconds");
        }
        if self.retries > 100 {
            issue("retries", "at most 100");
        }
        if self.api_key_env.as_ref().is_some_and(|name| !is_name(name)) {
            issue("api_key_env", "must be the name of an environment variable, not the key");
        }
        issues.extend(self.extra_body.iter().filter_map(|(name, value)| decided(request, path, name, value)));
        issues
    }

    pub(super) fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout)
    }

    pub(super) fn timeout_to_connect(&self) -> Duration {
        self.timeout().min(LONGEST_TO_CONNECT)
    }
}
