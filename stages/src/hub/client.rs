//! The hub over HTTP: what a repository's commit holds, and its files.

use std::{
    cell::RefCell,
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use serde::Deserialize;
use ureq::{Agent, Body, http::Response};

use crate::{
    StageError,
    endpoint::retry::{Delays, retry_after},
};

/// Tries of a file. Its description is asked for less often: what is known from earlier may do as well.
const TRIES: u32 = 6;
const TRIES_TO_DESCRIBE: u32 = 3;
/// How often a wait looks whether it should end.
const NAP: Duration = Duration::from_millis(50);
/// Bytes of a description at most.
const LONGEST_DESCRIPTION: u64 = 64 << 20;

pub struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    delays: Delays,
    /// The longest wait for a description, which holds up the planning of a run.
    patience: Duration,
}

/// A commit and its files.
#[derive(Debug, Deserialize)]
pub struct Description {
    #[serde(rename = "sha")]
    pub commit: String,
    #[serde(rename = "siblings", default)]
    pub files: Vec<RemoteFile>,
}

/// A file, with the digest that its content must have.
#[derive(Debug, Deserialize)]
pub struct RemoteFile {
    #[serde(rename = "rfilename")]
    pub path: String,
    #[serde(default)]
    pub size: u64,
    #[serde(rename = "blobId", default)]
    git_blob: Option<String>,
    #[serde(default)]
    lfs: Option<Lfs>,
}

#[derive(Debug, Deserialize)]
struct Lfs {
    sha256: String,
}

/// How a file's content is checked.
#[derive(Debug, PartialEq, Eq)]
pub enum Check<'a> {
    Sha256(&'a str),
    GitBlob(&'a str),
    Nothing,
}

impl RemoteFile {
    pub fn check(&self) -> Check<'_> {
        match (&self.lfs, &self.git_blob) {
            (Some(lfs), _) => Check::Sha256(&lfs.sha256),
            (None, Some(blob)) => Check::GitBlob(blob),
            (None, None) => Check::Nothing,
        }
    }
}

/// Why one try failed.
enum Trouble {
    /// It may pass, after this long if the hub says so.
    Passing(String, Option<Duration>),
    Final(StageError),
}

impl Trouble {
    fn passing(message: String) -> Self {
        Self::Passing(message, None)
    }
}

impl Client {
    pub fn new(endpoint: &str, token: Option<String>, patience: Duration) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .accept_encoding("identity")
            .user_agent(concat!("grlm/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(patience))
            .timeout_recv_response(Some(patience))
            .timeout_per_read(Some(patience))
            .build();
        let mut delays = Delays::default();
        delays.first = delays.first.min(patience / 20);
        Self { agent: Agent::new_with_config(config), endpoint: endpoint.to_owned(), token, delays, patience }
    }

    /// What a revision stands for, and the files of that commit.
    ///
    /// # Errors
    /// See [`super::Hub::resolve`].
    pub fn describe(&self, repository: &str, revision: &str) -> Result<Description, StageError> {
        let address =
            format!("{}/api/models/{repository}/revision/{}?blobs=true", self.endpoint, revision.replace('/', "%2F"));
        let wait = |wait: Duration| {
            std::thread::sleep(wait.min(self.patience));
            Ok(())
        };
        let description: Description = self.tried(TRIES_TO_DESCRIBE, repository, &address, wait, || {
            let response = self.get(&address, 0)?;
            if response.status().as_u16() != 200 {
                return Err(self.refused(&response, repository, revision));
            }
            let mut text = String::new();
            response
                .into_body()
                .into_reader()
                .take(LONGEST_DESCRIPTION)
                .read_to_string(&mut text)
                .map_err(|e| Trouble::passing(e.to_string()))?;
            serde_json::from_str(&text)
                .map_err(|e| Trouble::passing(format!("the answer is not a description of a model: {e}")))
        })?;
        let is_safe =
            |path: &str| !path.starts_with('/') && path.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !super::is_commit(&description.commit) || !description.files.iter().all(|f| is_safe(&f.path)) {
            return Err(StageError::params(format!(
                "{}: `{repository}` is described in a way that makes no sense",
                self.endpoint
            ))
            .help("is HF_ENDPOINT a hub?"));
        }
        Ok(description)
    }

    /// Fetches a file to `target`, going on from what is there.
    ///
    /// # Errors
    /// See [`super::Hub::fetch`].
    pub fn download(
        &self,
        repository: &str,
        commit: &str,
        file: &RemoteFile,
        target: &Path,
        progress: &mut dyn FnMut(u64) -> Result<(), StageError>,
    ) -> Result<(), StageError> {
        let address = format!("{}/{repository}/resolve/{commit}/{}", self.endpoint, file.path);
        let progress = RefCell::new(progress);
        let there = || fs::metadata(target).map_or(0, |m| m.len());
        let wait = |wait: Duration| {
            let until = Instant::now() + wait;
            while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
                // Which may say that it is to stop.
                progress.borrow_mut()(there().min(file.size))?;
                std::thread::sleep(left.min(NAP));
            }
            Ok(())
        };
        self.tried(TRIES, repository, &address, wait, || {
            let mut have = there();
            if have > file.size {
                let _ = fs::remove_file(target);
                have = 0;
            }
            if have == file.size && have > 0 {
                return Ok(());
            }
            let response = self.get(&address, have)?;
            match response.status().as_u16() {
                206 if have > 0 => {}
                200 => have = 0,
                _ => return Err(self.refused(&response, repository, commit)),
            }
            let own = |action, e| Trouble::Final(StageError::io(action, target, e));
            let mut out = if have > 0 { OpenOptions::new().append(true).open(target) } else { File::create(target) }
                .map_err(|e| own("write", e))?;
            let mut body = response.into_body().into_reader();
            let mut buffer = vec![0; 256 << 10];
            loop {
                let count =
                    body.read(&mut buffer).map_err(|e| Trouble::passing(format!("broke off at byte {have}: {e}")))?;
                if count == 0 {
                    break;
                }
                out.write_all(&buffer[..count]).map_err(|e| own("write", e))?;
                have += count as u64;
                progress.borrow_mut()(have.min(file.size)).map_err(Trouble::Final)?;
            }
            if have < file.size {
                return Err(Trouble::passing(format!("broke off at byte {have} of {}", file.size)));
            }
            out.sync_all().map_err(|e| own("write", e))
        })
    }

    fn get(&self, address: &str, from: u64) -> Result<Response<Body>, Trouble> {
        let mut request = self.agent.get(address);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        request.call().map_err(|e| Trouble::passing(e.to_string()))
    }

    fn refused(&self, response: &Response<Body>, repository: &str, revision: &str) -> Trouble {
        let status = response.status().as_u16();
        let help = match (status, &self.token) {
            (401 | 403, None) => "it may not exist, or ask for a token: set HF_TOKEN",
            (401 | 403, Some(_)) => "the token of HF_TOKEN may not read it; ask for access on the model's page",
            (404, _) => "check the spelling of the repository and of its revision",
            (408 | 429 | 500..=599, _) => {
                return Trouble::Passing(format!("the hub answered {status}"), asked_wait(response));
            }
            _ => "is HF_ENDPOINT a hub?",
        };
        let message = format!("{} has no `{repository}` at `{revision}` for us (status {status})", self.endpoint);
        Trouble::Final(StageError::params(message).help(help))
    }

    fn tried<T>(
        &self,
        tries: u32,
        repository: &str,
        address: &str,
        wait: impl Fn(Duration) -> Result<(), StageError>,
        mut attempt: impl FnMut() -> Result<T, Trouble>,
    ) -> Result<T, StageError> {
        let mut last = String::new();
        for round in 0..tries {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(Trouble::Final(error)) => return Err(error),
                Err(Trouble::Passing(message, asked)) => {
                    last = message;
                    if round + 1 < tries {
                        wait(asked.unwrap_or_else(|| self.delays.after(round)))?;
                    }
                }
            }
        }
        Err(StageError::Network {
            message: format!("{address}: {last}"),
            help: Some(format!("without network, put `{repository}` on this machine and give its folder")),
        })
    }
}

/// How long the hub asks us to wait: `Retry-After`, or what is left of its window, `RateLimit: "api";r=0;t=55`.
fn asked_wait(response: &Response<Body>) -> Option<Duration> {
    let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
    let window =
        || header("ratelimit").and_then(|text| text.split(';').find_map(|part| part.trim().strip_prefix("t=")));
    retry_after(header("retry-after").or_else(window), SystemTime::now())
}
