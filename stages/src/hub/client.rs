//! The hub over HTTP: what a repository's commit holds, and its files.

use std::{
    cell::RefCell,
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    path::Path,
    sync::mpsc::Sender,
    time::{Duration, Instant, SystemTime},
};

use serde::Deserialize;
use ureq::{Agent, Body, http::Response};

use super::{
    fault::{Fault, Trouble},
    redirect,
};
use crate::{
    StageError, StopFlag,
    endpoint::{
        lost::{Lost, lost},
        retry::{Delays, retry_after},
        stop,
    },
};

/// Tries of a file. Its description is asked for less often: what is known from earlier may do as well.
const TRIES: u32 = 6;
const TRIES_TO_DESCRIBE: u32 = 3;
/// How often a wait looks whether it should end.
const NAP: Duration = Duration::from_millis(50);
/// Bytes of a description at most.
const LONGEST_DESCRIPTION: u64 = 64 << 20;
/// Redirects that are followed one after the other.
const MOST_REDIRECTS: usize = 10;
/// Bytes of a redirect's body that are read so that its connection serves again.
const LONGEST_REDIRECT: u64 = 64 << 10;

pub struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    delays: Delays,
    /// The longest wait for a description, which holds up the planning of a run.
    patience: Duration,
    stop: StopFlag,
    /// Ends with this.
    _watch: Option<Sender<()>>,
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

/// What came of a request, and from where.
struct Answer {
    response: Response<Body>,
    asked: String,
    /// The same address, or where redirects led.
    from: String,
}

impl Answer {
    fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name).and_then(|value| value.to_str().ok())
    }

    /// How long the hub asks us to wait: `Retry-After`, or what is left of its window, `RateLimit: "api";r=0;t=55`.
    fn asked_wait(&self) -> Option<Duration> {
        let window = || {
            self.header("ratelimit").and_then(|text| text.split(';').find_map(|part| part.trim().strip_prefix("t=")))
        };
        let asked = retry_after(self.header("retry-after").or_else(window), SystemTime::now());
        asked.map(|asked| asked.wait)
    }

    /// Writes its body behind the `have` bytes of the file `target` that are there, and says how many there are then, of
    /// `size` in all.
    fn append_to(
        &mut self,
        target: &Path,
        mut have: u64,
        size: u64,
        progress: &mut dyn FnMut(u64) -> Result<(), StageError>,
    ) -> Result<u64, Trouble> {
        let own = |e| Trouble::Final(StageError::io("write", target, e));
        let out = if have > 0 { OpenOptions::new().append(true).open(target) } else { File::create(target) };
        let mut out = out.map_err(own)?;
        let mut body = self.response.body_mut().as_reader();
        let mut buffer = vec![0; 256 << 10];
        loop {
            let count = body.read(&mut buffer).map_err(|e| {
                let what = redirect::told(&self.asked, &self.from, format!("broke off at byte {have}: {e}"));
                Trouble::passing(Fault::BrokenOff, what)
            })?;
            if count == 0 {
                break;
            }
            out.write_all(&buffer[..count]).map_err(own)?;
            have += count as u64;
            progress(have.min(size)).map_err(Trouble::Final)?;
        }
        out.sync_all().map_err(own)?;
        Ok(have)
    }

    /// `what`, with the place where it happened if that is another than was asked.
    fn told(&self, what: impl Into<String>) -> String {
        redirect::told(&self.asked, &self.from, what)
    }
}

impl Client {
    pub fn new(endpoint: &str, token: Option<String>, patience: Duration) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .accept_encoding("identity")
            // They are followed here, so that a message can say where they led.
            .max_redirects(0)
            .user_agent(concat!("grlm/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(patience))
            .timeout_recv_response(Some(patience))
            .timeout_per_read(Some(patience))
            .build();
        let mut delays = Delays::default();
        delays.first = delays.first.min(patience / 20);
        Self {
            agent: Agent::new_with_config(config),
            endpoint: endpoint.to_owned(),
            token,
            delays,
            patience,
            stop: StopFlag::default(),
            _watch: None,
        }
    }

    /// Ends requests and waits once `stop` is set, those too that are under way.
    pub fn until(mut self, stop: StopFlag) -> Self {
        self._watch = Some(stop::watch(self.agent.clone(), stop.clone()));
        self.stop = stop;
        self
    }

    /// What a revision stands for, and the files of that commit.
    ///
    /// # Errors
    /// See [`super::Hub::resolve`].
    pub fn describe(&self, repository: &str, revision: &str) -> Result<Description, StageError> {
        let address =
            format!("{}/api/models/{repository}/revision/{}?blobs=true", self.endpoint, revision.replace('/', "%2F"));
        let wait = |wait: Duration| {
            let until = Instant::now() + wait.min(self.patience);
            while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
                if self.stop.is_set() {
                    return Err(StageError::Stopped);
                }
                std::thread::sleep(left.min(NAP));
            }
            Ok(())
        };
        let description: Description = self.tried(TRIES_TO_DESCRIBE, repository, &address, wait, || {
            let mut answer = self.get(&address, 0).map_err(Trouble::lasting_if_barred)?;
            if answer.status() != 200 {
                return Err(self.refused(&answer, repository, revision));
            }
            let mut text = Vec::new();
            let mut body = answer.response.body_mut().as_reader().take(LONGEST_DESCRIPTION);
            let read = body.read_to_end(&mut text);
            read.map_err(|e| Trouble::passing(Fault::BrokenOff, answer.told(format!("broke off: {e}"))))?;
            serde_json::from_slice(&text).map_err(|e| {
                let what = format!("the answer is not a description of a model: {e}");
                Trouble::passing(Fault::NoHub, answer.told(what))
            })
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
            let mut answer = self.get(&address, have)?;
            let length: Option<u64> = answer.header("content-length").and_then(|length| length.parse().ok());
            match answer.status() {
                206 if have > 0 => {}
                200 if length.is_some_and(|length| length < file.size) => {
                    let what = format!("the answer is not the file: it is shorter than its {} bytes", file.size);
                    return Err(Trouble::passing(Fault::NoHub, answer.told(what)));
                }
                200 => have = 0,
                _ => return Err(self.refused(&answer, repository, commit)),
            }
            let is_measured = answer.status() == 206 || length.is_some();
            let received = answer.append_to(target, have, file.size, &mut |done| progress.borrow_mut()(done));
            let received = received.and_then(|end| match end {
                end if end >= file.size => Ok(()),
                end if is_measured => {
                    let what = format!("broke off at byte {end} of {}", file.size);
                    Err(Trouble::passing(Fault::BrokenOff, answer.told(what)))
                }
                end => {
                    let what = format!("the answer is not the file: it ends at byte {end} of {}", file.size);
                    Err(Trouble::passing(Fault::NoHub, answer.told(what)))
                }
            });
            if received.is_err() && !is_measured {
                // A page perhaps, and no beginning to go on from.
                let _ = fs::remove_file(target);
            }
            received
        })
    }

    /// The answer at the end of all redirects. The token goes to the hub alone.
    fn get(&self, address: &str, from: u64) -> Result<Answer, Trouble> {
        let mut at = address.to_owned();
        for _ in 0..=MOST_REDIRECTS {
            let mut request = self.agent.get(&at);
            if let Some(token) = &self.token
                && redirect::is_same_place(address, &at)
            {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let mut response = request.call().map_err(|error| self.lost(address, &at, &error))?;
            let location = match response.status().as_u16() {
                301 | 302 | 303 | 307 | 308 => response.headers().get("location").and_then(|l| l.to_str().ok()),
                _ => None,
            };
            let Some(next) = location.map(|location| redirect::target(&at, location)) else {
                return Ok(Answer { response, asked: address.to_owned(), from: at });
            };
            let _ = response.body_mut().with_config().limit(LONGEST_REDIRECT).read_to_vec();
            at = next;
        }
        let what = redirect::told(address, &at, format!("and on, after {MOST_REDIRECTS} redirects"));
        Err(Trouble::Lasting(Fault::NoHub, what))
    }

    /// A request that had no answer.
    fn lost(&self, address: &str, at: &str, error: &ureq::Error) -> Trouble {
        let (fault, what) = match lost(error, self.patience) {
            Lost::Address(what) if at == address => {
                let help = "HF_ENDPOINT must be the address of a hub, such as https://huggingface.co";
                return Trouble::Final(StageError::params(format!("{address}: {what}")).help(help));
            }
            Lost::Address(what) => return Trouble::Lasting(Fault::NoHub, redirect::told(address, at, what)),
            Lost::NoConnection(what) if redirect::is_same_place(address, at) => (Fault::NoConnection, what),
            Lost::NoConnection(what) => (Fault::Barred(redirect::host(at).to_owned()), what),
            Lost::TooLate => (Fault::InTrouble, format!("no answer within {} s", self.patience.as_secs_f64())),
            Lost::BrokenOff(what) => (Fault::BrokenOff, format!("the connection broke: {what}")),
            Lost::NoTls(what) | Lost::NoHttp(what) | Lost::Other(what) => (Fault::NoHub, what),
        };
        Trouble::passing(fault, redirect::told(address, at, what))
    }

    fn refused(&self, answer: &Answer, repository: &str, revision: &str) -> Trouble {
        let status = answer.status();
        let help = match (status, &self.token) {
            (401 | 403, None) => "it may not exist, or ask for a token: set HF_TOKEN",
            (401 | 403, Some(_)) => "the token of HF_TOKEN may not read it; ask for access on the model's page",
            (404, _) => "check the spelling of the repository and of its revision",
            (408 | 429 | 500..=599, _) => {
                let fault = if status == 429 { Fault::Limited } else { Fault::InTrouble };
                let what = answer.told(format!("status {status}"));
                return Trouble::Passing(fault, what, answer.asked_wait());
            }
            _ => "is HF_ENDPOINT a hub?",
        };
        let status = answer.told(format!("status {status}"));
        let message = format!("{} has no `{repository}` at `{revision}` for us ({status})", self.endpoint);
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
        let mut round = 0;
        loop {
            round += 1;
            let (fault, message) = match attempt() {
                Ok(value) => return Ok(value),
                Err(_) if self.stop.is_set() => return Err(StageError::Stopped),
                Err(Trouble::Final(error)) => return Err(error),
                Err(Trouble::Passing(_, _, asked)) if round < tries => {
                    wait(asked.unwrap_or_else(|| self.delays.after(round - 1)))?;
                    continue;
                }
                Err(Trouble::Passing(fault, message, _) | Trouble::Lasting(fault, message)) => (fault, message),
            };
            let help = Some(fault.help(&self.endpoint, repository));
            return Err(StageError::Network { message: format!("{address}: {message}"), help });
        }
    }
}
