//! A server that speaks OpenAI's HTTP interface (vLLM, SGLang, TGI, llama.cpp, `transformers serve`): requests with
//! a time limit, and new tries where one can help. How many are under way at once is the row job's to say
//! ([`RowJob::requests`](crate::rows::RowJob::requests)).
//!
//! | what happens | what is done |
//! |---|---|
//! | no connection, no whole answer in time, 408, 409, 425, 429, 5xx, an answer that is not what was asked for | tried again, later and later, or when `Retry-After` says |
//! | 400, 413, 415, 422 | this request has failed; the others go on |
//! | 401, 403, 404 and other refusals | a mistake in the parameters: all end, and the stage is not tried again |
//! | as many requests in a row have failed for good as are under way at once | the server is taken to be down: all end |
//!
//! The key stands in the one header that is sent, and is blanked in every message.

use std::{
    collections::BTreeMap,
    fmt, io,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use serde_json::{Map, Value};
use ureq::{Agent, Timeout};

use crate::{ParamIssue, StageError, StopFlag, rows::RowFailure};

pub(crate) mod retry;
#[cfg(test)]
pub(crate) mod server;
#[cfg(test)]
mod tests;

use retry::{Delays, retry_after};

/// An answer larger than this is not one.
const LARGEST_ANSWER: u64 = 256 << 20;
/// How often a waiting request looks whether it should stop.
const NAP: Duration = Duration::from_millis(50);
/// Characters of a server's message that are shown.
const SHOWN: usize = 300;
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

/// The variable of a server's key, as [`crate::Stage::secrets`] names it; `at` is where the settings stand.
pub fn secret(at: &str, api_key_env: Option<&str>) -> BTreeMap<String, String> {
    api_key_env.map(|name| (format!("{at}.api_key_env"), name.to_owned())).into_iter().collect()
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

impl Settings {
    /// Mistakes in these settings and in the server's address, under `path`. Without an address, no server is asked,
    /// and settings that only make sense with one are mistakes.
    pub fn check(&self, path: &str, address: Option<&str>) -> Vec<ParamIssue> {
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
        if self.api_key_env.as_ref().is_some_and(|name| name.is_empty() || name.contains(['=', '\0', ' '])) {
            issue("api_key_env", "must be the name of an environment variable, not the key");
        }
        issues
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout)
    }

    fn timeout_to_connect(&self) -> Duration {
        self.timeout().min(LONGEST_TO_CONNECT)
    }
}

/// Why there is no answer to a request.
#[derive(Debug)]
pub enum CallError {
    /// The server will not answer this request, whoever asks again; others it may.
    Refused(RowFailure),
    /// No try had an answer of use. `answered`: the server had one to the last, so that it may be this request's fault.
    NoAnswer { failure: RowFailure, answered: bool },
    /// No request will have one.
    All(StageError),
}

impl CallError {
    /// What is wrong with this request alone.
    ///
    /// # Errors
    /// What ends all requests.
    pub fn of_one(self) -> Result<RowFailure, StageError> {
        match self {
            Self::Refused(failure) | Self::NoAnswer { failure, .. } => Ok(failure),
            Self::All(error) => Err(error),
        }
    }
}

/// A server, ready to be asked from many threads.
pub struct Endpoint {
    agent: Agent,
    /// Without a slash at the end.
    address: String,
    /// `None` also where the variable of the key is not set.
    key: Option<String>,
    settings: Settings,
    delays: Delays,
    stop: StopFlag,
    /// No request is sent before.
    not_before: Mutex<Option<Instant>>,
    /// Requests that failed for good since the last that did not.
    failed_in_a_row: AtomicUsize,
    counts: Mutex<Counts>,
}

/// What became of requests so far.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Counts {
    answered: usize,
    failed: usize,
    /// Reasons of new tries, in order of first appearance.
    again: Vec<(String, usize)>,
}

/// One try that did not succeed.
enum Miss {
    Again { reason: String, message: String, wait: Option<Duration>, answered: bool },
    Request(String),
    All(StageError),
}

impl Endpoint {
    /// `address` is the base of the interface; `/v1` is added to a bare host. A key that is not there is missed by the
    /// first request: what is known already needs none.
    pub fn new(address: &str, settings: Settings, stop: StopFlag) -> Self {
        let key = settings.api_key_env.as_ref().and_then(|name| std::env::var(name).ok());
        let key = key.map(|key| key.trim().to_owned()).filter(|key| !key.is_empty());
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(settings.timeout()))
            .timeout_connect(Some(settings.timeout_to_connect()))
            .max_idle_connections(settings.concurrency)
            .max_idle_connections_per_host(settings.concurrency)
            .user_agent("grlm")
            .build();
        let mut address = address.trim_end_matches('/').to_owned();
        if address.split_once("://").is_some_and(|(_, rest)| !rest.contains('/')) {
            address.push_str("/v1");
        }
        Self {
            agent: config.new_agent(),
            address,
            key,
            settings,
            delays: Delays::default(),
            stop,
            not_before: Mutex::new(None),
            failed_in_a_row: AtomicUsize::new(0),
            counts: Mutex::default(),
        }
    }

    /// Shortens all waits, for tests.
    #[cfg(test)]
    pub(crate) fn with_delays(mut self, first: Duration, longest: Duration) -> Self {
        self.delays = Delays { first, longest };
        self
    }

    /// Posts `body` to `path` (such as `chat/completions`) until `accept` takes the answer or there is none.
    ///
    /// # Errors
    /// As the table above says; there is no key.
    pub fn post<T>(
        &self,
        path: &str,
        body: Map<String, Value>,
        accept: impl Fn(&Value) -> Result<T, String>,
    ) -> Result<T, CallError> {
        self.post_up_to(self.settings.retries + 1, path, body, accept)
    }

    /// [`Endpoint::post`] with one try.
    ///
    /// # Errors
    /// As for `post`.
    pub fn post_once<T>(
        &self,
        path: &str,
        body: Map<String, Value>,
        accept: impl Fn(&Value) -> Result<T, String>,
    ) -> Result<T, CallError> {
        self.post_up_to(1, path, body, accept)
    }

    fn post_up_to<T>(
        &self,
        tries: u32,
        path: &str,
        body: Map<String, Value>,
        accept: impl Fn(&Value) -> Result<T, String>,
    ) -> Result<T, CallError> {
        self.check_key()?;
        let url = format!("{}/{path}", self.address);
        let body = Value::Object(self.with_extra(body)).to_string();
        let (mut last, mut last_answered) = (String::new(), false);
        for attempt in 0..tries {
            self.wait_for_turn()?;
            if self.failed_in_a_row.load(Ordering::Relaxed) >= self.settings.concurrency.max(3) {
                return Err(CallError::All(self.down(&url)));
            }
            match self.attempt(&url, &body, &accept) {
                Ok(answer) => {
                    self.failed_in_a_row.store(0, Ordering::Relaxed);
                    locked(&self.counts).answered += 1;
                    return Ok(answer);
                }
                Err(Miss::Request(message)) => {
                    locked(&self.counts).failed += 1;
                    return Err(CallError::Refused(RowFailure::new(message)));
                }
                Err(Miss::All(error)) => {
                    let help = "check the address, the model's name and the key; what was answered until now is kept";
                    return Err(CallError::All(error.help(help)));
                }
                Err(Miss::Again { reason, message, wait, answered }) => {
                    (last, last_answered) = (message, answered);
                    if attempt + 1 < tries {
                        self.count_again(reason);
                        self.back_off(attempt, wait)?;
                    }
                }
            }
        }
        self.failed_in_a_row.fetch_add(1, Ordering::Relaxed);
        locked(&self.counts).failed += 1;
        let failure = RowFailure::new(format!("no answer in {}; the last: {last}", counted(tries, "try", "tries")));
        Err(CallError::NoAnswer { failure, answered: last_answered })
    }

    fn check_key(&self) -> Result<(), CallError> {
        match &self.settings.api_key_env {
            Some(name) if self.key.is_none() => {
                let message = format!("the environment variable `{name}` is not set for this stage");
                let help = format!("export it, and declare it at the stage: `secrets: [{name}]`");
                Err(CallError::All(StageError::params(message).help(help)))
            }
            _ => Ok(()),
        }
    }

    /// What became of all requests, in words, where there is something to tell.
    pub fn report(&self) -> Option<String> {
        let counts = locked(&self.counts).clone();
        if counts.again.is_empty() && counts.failed == 0 {
            return None;
        }
        let again: usize = counts.again.iter().map(|(_, n)| n).sum();
        let reasons: Vec<String> = counts.again.iter().map(|(reason, n)| format!("{n} × {reason}")).collect();
        let mut text = format!("{}: {} requests answered", self.address, counts.answered);
        if counts.failed > 0 {
            text.push_str(&format!(", {} failed", counts.failed));
        }
        if again > 0 {
            text.push_str(&format!("; {again} tried again ({})", reasons.join(", ")));
        }
        Some(text)
    }

    fn with_extra(&self, mut body: Map<String, Value>) -> Map<String, Value> {
        for (name, value) in &self.settings.extra_body {
            if value.is_null() {
                body.shift_remove(name);
            } else {
                body.insert(name.clone(), value.clone());
            }
        }
        body
    }

    fn attempt<T>(&self, url: &str, body: &str, accept: &impl Fn(&Value) -> Result<T, String>) -> Result<T, Miss> {
        let again = |reason: &str, message: String| Miss::Again {
            reason: reason.to_owned(),
            message,
            wait: None,
            answered: true,
        };
        let mut request = self.agent.post(url).content_type("application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = request.send(body).map_err(|error| self.lost(url, error))?;
        let status = response.status().as_u16();
        let wait =
            retry_after(response.headers().get("retry-after").and_then(|value| value.to_str().ok()), SystemTime::now());
        let text = response.body_mut().with_config().limit(LARGEST_ANSWER).read_to_vec();
        match status {
            200..=299 => {
                let text = text.map_err(|error| self.lost(url, error))?;
                let value: Value = serde_json::from_slice(&text)
                    .map_err(|_| again("not JSON", format!("{url}: not JSON: {}", self.shown(&text))))?;
                accept(&value).map_err(|problem| {
                    let text = self.shown(&text);
                    again("another answer than was asked for", format!("{url}: {problem}: {text}"))
                })
            }
            _ => {
                let message = text.map(|text| self.message_of(&text)).unwrap_or_default();
                let message = format!("{url}: status {status}{}{message}", if message.is_empty() { "" } else { ": " });
                Err(match status {
                    408 | 409 | 425 | 429 | 500..=599 => {
                        let answered = status >= 500;
                        Miss::Again { reason: format!("status {status}"), message, wait, answered }
                    }
                    400 | 413 | 415 | 422 => Miss::Request(message),
                    _ => Miss::All(StageError::params(message)),
                })
            }
        }
    }

    /// A request that got no whole answer.
    fn lost(&self, url: &str, error: ureq::Error) -> Miss {
        use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable};
        let seconds = |limit: Duration| format!("within {} s", limit.as_secs_f64());
        let (reason, what) = match &error {
            ureq::Error::Timeout(Timeout::Connect | Timeout::Resolve) => {
                ("no connection", format!("no connection {}", seconds(self.settings.timeout_to_connect())))
            }
            ureq::Error::Timeout(_) => {
                ("no answer in time", format!("no whole answer {}", seconds(self.settings.timeout())))
            }
            ureq::Error::HostNotFound | ureq::Error::ConnectionFailed => ("no connection", error.to_string()),
            ureq::Error::Io(cause)
                if matches!(cause.kind(), ConnectionRefused | HostUnreachable | NetworkUnreachable) =>
            {
                ("no connection", format!("no connection: {cause}"))
            }
            ureq::Error::Io(_) | ureq::Error::Protocol(_) | ureq::Error::BodyStalled | ureq::Error::Decompress(..) => {
                ("half an answer or none", format!("the connection broke: {error}"))
            }
            _ => return Miss::All(StageError::Network { message: format!("{url}: {error}"), help: None }),
        };
        Miss::Again { reason: reason.to_owned(), message: format!("{url}: {what}"), wait: None, answered: false }
    }

    fn down(&self, url: &str) -> StageError {
        let failed = self.failed_in_a_row.load(Ordering::Relaxed);
        StageError::Network { message: format!("{url}: {failed} requests in a row had no answer"), help: None }
            .help("see whether the server runs; what was answered until now is kept, and a rerun goes on")
    }

    /// Sleeps until requests may be sent.
    fn wait_for_turn(&self) -> Result<(), CallError> {
        loop {
            if self.stop.is_set() {
                return Err(CallError::All(StageError::Stopped));
            }
            let until = *locked(&self.not_before);
            match until.map(|until| until.saturating_duration_since(Instant::now())) {
                Some(left) if !left.is_zero() => std::thread::sleep(left.min(NAP)),
                _ => return Ok(()),
            }
        }
    }

    /// Waits before the next try; a wait that the server asked for holds all requests back.
    fn back_off(&self, attempt: u32, asked: Option<Duration>) -> Result<(), CallError> {
        let until = Instant::now() + asked.unwrap_or_else(|| self.delays.after(attempt));
        if asked.is_some() {
            let mut not_before = locked(&self.not_before);
            *not_before = Some(not_before.map_or(until, |earlier| earlier.max(until)));
        }
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if self.stop.is_set() {
                return Err(CallError::All(StageError::Stopped));
            }
            std::thread::sleep(left.min(NAP));
        }
        Ok(())
    }

    fn count_again(&self, reason: String) {
        let mut counts = locked(&self.counts);
        match counts.again.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, count)) => *count += 1,
            None => counts.again.push((reason, 1)),
        }
    }

    /// The message in the body of an error, in OpenAI's layout or any other.
    fn message_of(&self, body: &[u8]) -> String {
        let value: Option<Value> = serde_json::from_slice(body).ok();
        let found = value.as_ref().and_then(|value| {
            let places =
                [value.pointer("/error/message"), value.get("message"), value.get("detail"), value.get("error")];
            places.into_iter().flatten().find_map(Value::as_str)
        });
        self.shown(found.map_or(body, str::as_bytes))
    }

    /// The beginning of a text of the server's, on one line. The key is blanked before it is cut: a part of it would be
    /// found by nobody.
    fn shown(&self, text: &[u8]) -> String {
        let mut text = String::from_utf8_lossy(text).into_owned();
        if let Some(key) = &self.key {
            text = text.replace(key.as_str(), "***");
        }
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        match line.char_indices().nth(SHOWN) {
            Some((end, _)) => format!("{}…", &line[..end]),
            None => line,
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({})", self.address)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole between calls, so a panic elsewhere does no harm.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn counted(number: u32, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}
