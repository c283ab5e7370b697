//! A server that speaks OpenAI's HTTP interface (vLLM, SGLang, TGI, llama.cpp, `transformers serve`): requests with
//! a time limit, and new tries where one can help. How many are under way at once is the row job's to say
//! ([`RowJob::requests`](crate::rows::RowJob::requests)).
//!
//! | what happens | what is done |
//! |---|---|
//! | no connection, no whole answer in time, 408, 409, 425, 429, 5xx, an answer that is not what was asked for | tried again, later and later, or when `Retry-After` says |
//! | 400, 413, 415, 422 | this request has failed; the others go on |
//! | 401, 403, 404 and other refusals, a redirect, no TLS at a server that never answered | a mistake in the parameters: all end, and the stage is not tried again |
//! | as many requests in a row as are under way at once have failed for good without an answer (429 and 502 to 504 are none) | the server is taken to be down: all end |
//! | failed rows end the stage, no request had an answer of use, and none is known from earlier | told as the server's fault ([`Endpoint::conclude`]) |
//! | a stop | all end, those too that are under way |
//!
//! The key stands in the one header that is sent, and is blanked in every message.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError, mpsc::Sender},
    time::{Duration, Instant, SystemTime},
};

use serde_json::{Map, Value};
use ureq::Agent;

use crate::{
    StageContext, StageError, StopFlag,
    rows::{Notes, RowFailure, RowJob, Rows},
};

pub(crate) mod lost;
mod redact;
pub(crate) mod retry;
#[cfg(test)]
pub(crate) mod server;
mod settings;
pub(crate) mod stop;
mod tally;
#[cfg(test)]
mod tests;

use lost::{Lost, lost};
use retry::{Delays, Pause, RetryAfter, retry_after};
pub use settings::{Request, Settings, concurrency, retries, secret, timeout};
use tally::{NO_CONNECTION, NOT_JSON, OTHER_ANSWER, TOO_LATE, Tally};

/// An answer larger than this is not one.
const LARGEST_ANSWER: u64 = 256 << 20;
/// How often a waiting request looks whether it should stop.
const NAP: Duration = Duration::from_millis(50);
/// Rows that are looked for at a time among those known.
const LOOKED_UP: usize = 256;
/// Characters of a server's message that are shown.
const SHOWN: usize = 300;

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
    /// Ends with this.
    _watch: Sender<()>,
    /// What the server asked for: no request is sent before its end.
    pause: Mutex<Pause>,
    notes: Mutex<Notes>,
    /// What ends all requests, those that wait too.
    ended: OnceLock<StageError>,
    tally: Mutex<Tally>,
}

/// One try that did not succeed.
enum Miss {
    Again { reason: String, message: String, wait: Option<RetryAfter>, answered: bool },
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
            // The body would not be sent on.
            .max_redirects(0)
            .user_agent("grlm")
            .build();
        let agent = config.new_agent();
        let mut address = address.trim_end_matches('/').to_owned();
        if address.split_once("://").is_some_and(|(_, rest)| !rest.contains('/')) {
            address.push_str("/v1");
        }
        Self {
            _watch: stop::watch(agent.clone(), stop.clone()),
            agent,
            address,
            key,
            settings,
            delays: Delays::default(),
            stop,
            pause: Mutex::default(),
            notes: Mutex::default(),
            ended: OnceLock::new(),
            tally: Mutex::default(),
        }
    }

    /// Shortens all waits, for tests.
    #[cfg(test)]
    pub(crate) fn with_delays(mut self, first: Duration, longest: Duration) -> Self {
        self.delays = Delays { first, longest };
        self
    }

    /// Says by these notes what the user should hear while requests wait.
    pub fn tell_by(&self, notes: &Notes) {
        *locked(&self.notes) = notes.clone();
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
        let (mut last, mut last_reason, mut last_answered) = (String::new(), String::new(), false);
        for attempt in 0..tries {
            self.wait_for_turn()?;
            let down = locked(&self.tally).down(self.settings.concurrency.max(3));
            if let Some(down) = down {
                return Err(CallError::All(self.end(down)));
            }
            locked(&self.tally).asked(Instant::now());
            let outcome = self.attempt(&url, &body, &accept);
            if outcome.is_err() && self.stop.is_set() {
                return Err(CallError::All(StageError::Stopped));
            }
            match outcome {
                Ok(answer) => {
                    locked(&self.tally).answered();
                    return Ok(answer);
                }
                Err(Miss::Request(message)) => {
                    locked(&self.tally).refused();
                    return Err(CallError::Refused(RowFailure::new(message)));
                }
                Err(Miss::All(error)) => return Err(CallError::All(self.end(error))),
                Err(Miss::Again { reason, message, wait, answered }) => {
                    if answered {
                        locked(&self.tally).heard();
                    }
                    if attempt + 1 < tries {
                        locked(&self.tally).tried_again(&reason);
                        self.tell_of_silence(&url, &message, wait);
                        self.back_off(attempt, wait, &message)?;
                    }
                    (last, last_reason, last_answered) = (message, reason, answered);
                }
            }
        }
        // Without the number of tries: rows that failed alike are told together.
        let failure = RowFailure::new(format!("no answer of use; the last: {last}"));
        locked(&self.tally).failed(last_reason, last, last_answered);
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

    /// The last refusal was no failure: the caller asks otherwise.
    pub fn forget_refusal(&self) {
        locked(&self.tally).forget_refusal();
    }

    /// What became of all requests, in words, where there is something to tell.
    fn report(&self) -> Option<String> {
        locked(&self.tally).report(&self.address)
    }

    /// How a job ended that this server was asked for; tells what became of all requests. Where too many rows failed
    /// because there never was an answer of use, what helps has to do with the server, and not with the rows.
    ///
    /// # Errors
    /// As `outcome`.
    pub fn conclude(
        &self,
        cx: &mut StageContext,
        job: &RowJob,
        outcome: Result<Rows, StageError>,
    ) -> Result<Rows, StageError> {
        let answered_earlier = match &outcome {
            Ok(rows) => rows.known() > 0,
            Err(_) => locked(&self.tally).is_in_vain() && is_any_known(cx, job),
        };
        if answered_earlier {
            locked(&self.tally).answered_earlier();
        }
        if let Some(report) = self.report() {
            cx.info(report);
        }
        outcome.map_err(|error| self.explain(error))
    }

    fn explain(&self, error: StageError) -> StageError {
        match (error, locked(&self.tally).fault(&self.address)) {
            (error @ StageError::FailedRows { .. }, Some(fault)) => error.help(fault),
            (error, _) => error,
        }
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
        locked(&self.tally).reached();
        let status = response.status().as_u16();
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let wait = retry_after(header("retry-after"), SystemTime::now());
        // Without what may be a key.
        let target = header("location").and_then(|target| target.split('?').next()).map(str::to_owned);
        let text = response.body_mut().with_config().limit(LARGEST_ANSWER).read_to_vec();
        match status {
            200..=299 => {
                let text = text.map_err(|error| self.lost(url, error))?;
                let value: Value = serde_json::from_slice(&text)
                    .map_err(|_| again(NOT_JSON, format!("{url}: not JSON: {}", self.shown(&text))))?;
                accept(&value).map_err(|problem| {
                    let text = self.shown(&text);
                    again(OTHER_ANSWER, format!("{url}: {problem}: {text}"))
                })
            }
            300..=399 if target.is_some() => {
                let target = self.shown(target.unwrap_or_default().as_bytes());
                Err(Miss::All(StageError::params(format!("{url}: status {status}: it redirects to {target}")).help(
                    "requests are not sent on: give the address at which the server itself answers, which ends before \
                     `/chat/completions` or `/embeddings`",
                )))
            }
            _ => {
                let message = text.map(|text| self.message_of(&text)).unwrap_or_default();
                let message = format!("{url}: status {status}{}{message}", if message.is_empty() { "" } else { ": " });
                Err(match status {
                    408 | 409 | 425 | 429 | 500..=599 => {
                        // A proxy without its server says so by 502 to 504, of whatever request.
                        let answered = status >= 500 && !(502..=504).contains(&status);
                        Miss::Again { reason: format!("status {status}"), message, wait, answered }
                    }
                    400 | 413 | 415 | 422 => Miss::Request(message),
                    _ => Miss::All(StageError::params(message).help(match status {
                        401 | 403 => "check the key (`api_key_env`) and what it is for; what was answered until now is kept",
                        _ => {
                            "this is not the interface, or not its model: check the address, which ends before \
                             `/chat/completions` or `/embeddings`, and the model's name; what was answered until now is kept"
                        }
                    })),
                })
            }
        }
    }

    /// A request that got no whole answer.
    fn lost(&self, url: &str, error: ureq::Error) -> Miss {
        let (reason, what) = match lost(&error, self.settings.timeout_to_connect()) {
            Lost::NoConnection(what) => (NO_CONNECTION, what),
            Lost::TooLate => (TOO_LATE, format!("no whole answer within {} s", self.settings.timeout)),
            Lost::NoTls(what) if !locked(&self.tally).is_reached() => {
                return Miss::All(StageError::params(format!("{url}: no TLS connection: {what}")).help(
                    "if the server speaks plain HTTP, begin the address with `http://`; if its certificate is its own, \
                     put a proxy before it: only those of public authorities are trusted",
                ));
            }
            Lost::BrokenOff(what) | Lost::NoTls(what) | Lost::NoHttp(what) => {
                ("half an answer or none", format!("the connection broke: {what}"))
            }
            Lost::Address(what) | Lost::Other(what) => {
                return Miss::All(StageError::Network { message: format!("{url}: {what}"), help: None });
            }
        };
        Miss::Again { reason: reason.to_owned(), message: format!("{url}: {what}"), wait: None, answered: false }
    }

    /// Ends all requests, those that wait too, with this error, or the first that did.
    pub fn end(&self, error: StageError) -> StageError {
        copied(self.ended.get_or_init(|| error))
    }

    fn check_end(&self) -> Result<(), CallError> {
        if self.stop.is_set() {
            return Err(CallError::All(StageError::Stopped));
        }
        self.ended.get().map_or(Ok(()), |error| Err(CallError::All(copied(error))))
    }

    /// Sleeps until requests may be sent.
    fn wait_for_turn(&self) -> Result<(), CallError> {
        loop {
            self.check_end()?;
            let until = locked(&self.pause).until();
            match until.map(|until| until.saturating_duration_since(Instant::now())) {
                Some(left) if !left.is_zero() => std::thread::sleep(left.min(NAP)),
                _ => return Ok(()),
            }
        }
    }

    /// Says once that no request was answered yet, where tries go on failing. A long wait that the server asks for is
    /// told for itself.
    fn tell_of_silence(&self, url: &str, message: &str, asked: Option<RetryAfter>) {
        if !asked.is_some_and(|asked| asked.is_long()) && locked(&self.tally).missed(Instant::now()) {
            let reason = message.strip_prefix(url).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(message);
            locked(&self.notes).warn(format!("{}: no request is answered yet ({reason}); trying again", self.address));
        }
    }

    /// Waits before the next try; a wait that the server asked for, `message` with it, holds all requests back.
    fn back_off(&self, attempt: u32, asked: Option<RetryAfter>, message: &str) -> Result<(), CallError> {
        let now = Instant::now();
        if let Some(asked) = &asked
            && locked(&self.pause).extend(asked.wait, now)
        {
            locked(&self.notes).warn(format!("{message}; {asked}"));
        }
        let until = now + asked.map_or_else(|| self.delays.after(attempt), |asked| asked.wait);
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            self.check_end()?;
            std::thread::sleep(left.min(NAP));
        }
        Ok(())
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
            text = redact::without(text, key);
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

/// Whether a row of the job was answered earlier. Where that cannot be found out, nobody is blamed.
fn is_any_known(cx: &mut StageContext, job: &RowJob) -> bool {
    let mut memo = cx.take_rows();
    let mut pieces = job.keys.chunks(LOOKED_UP).map(|keys| memo.look_up(&job.namespace, keys));
    let none = pieces.all(|found| found.is_ok_and(|found| found.iter().all(Option::is_none)));
    cx.put_rows(memo);
    !none
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole between calls, so a panic elsewhere does no harm.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same once more, of what ends requests.
fn copied(error: &StageError) -> StageError {
    match error {
        StageError::Params { message, help } => StageError::Params { message: message.clone(), help: help.clone() },
        StageError::Network { message, help } => StageError::Network { message: message.clone(), help: help.clone() },
        StageError::FailedRows { message, help } => {
            StageError::FailedRows { message: message.clone(), help: help.clone() }
        }
        _ => StageError::bug(error.to_string()),
    }
}
