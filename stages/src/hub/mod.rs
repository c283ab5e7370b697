//! Pretrained models: a folder on disk, or a repository of the Hugging Face hub, pinned to a commit and kept in the
//! cache that all Hugging Face programs share.
//!
//! | variable | meaning |
//! |---|---|
//! | `HF_ENDPOINT` | the hub or a mirror of it; `https://huggingface.co` unless set |
//! | `HF_TOKEN`, or the file `token` in `HF_HOME` | for repositories that ask for one; never logged, never recorded |
//! | `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME` | where files are kept: `…/hub`, laid out as `huggingface_hub` does |
//! | `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` | only what is in the cache is used |
//!
//! A name of a branch is *resolved* to a commit when a run is planned; the commit enters the action key, and the worker
//! takes that very commit. Files are checked against the digests that the hub states.
//!
//! Another program may have put a commit into the cache, and only those of its files that it needed. Where the hub
//! cannot be asked for the others, what is there is a folder like any other: its files tell it apart, not the commit.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{Failure, StageError, StopFlag};

mod cache;
mod client;
mod fault;
mod redirect;
#[cfg(test)]
mod tests;

use client::Client;

/// The revision that is meant where none is named.
pub const MAIN: &str = "main";

/// A pretrained model, as a parameter names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ModelName {
    Folder(PathBuf),
    /// `organisation/name`, or `organisation/name@revision`.
    Hub {
        repository: String,
        revision: String,
    },
}

impl ModelName {
    /// A name is a folder if there is one of that name, or if it looks like a path.
    ///
    /// # Errors
    /// It is neither a folder nor the name of a repository; in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        let looks_like_a_path = text.starts_with(['/', '.', '~']) || text.split('/').count() > 2;
        if looks_like_a_path || Path::new(text).is_dir() {
            return Ok(Self::Folder(match text.strip_prefix("~/").zip(env::var_os("HOME")) {
                Some((rest, home)) => Path::new(&home).join(rest),
                None => text.into(),
            }));
        }
        let (repository, revision) = text.split_once('@').unwrap_or((text, MAIN));
        let is_name = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        let is_revision = !revision.is_empty()
            && !revision.contains("..")
            && revision.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'));
        match repository.split_once('/') {
            Some((organisation, name)) if is_name(organisation) && is_name(name) && is_revision => {
                Ok(Self::Hub { repository: repository.to_owned(), revision: revision.to_owned() })
            }
            _ => Err(format!("`{text}` is neither a folder nor a repository of the hub")),
        }
    }
}

/// Where a model is, with nothing left open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PinnedModel {
    Folder(PathBuf),
    Hub {
        repository: String,
        commit: String,
    },
    /// Nothing could be learned about it when the run was planned.
    Unknown {
        message: String,
        help: Option<String>,
        /// It is a mistake: trying again cannot help.
        wrong: bool,
    },
}

impl PinnedModel {
    /// A model about which this was learned, and no more.
    pub fn unknown(error: StageError) -> Self {
        let (wrong, help) = (error.failure() == Failure::WrongInput, error.help_text().map(str::to_owned));
        let message = match error {
            // Said again where the model is opened.
            StageError::Network { message, .. } => message,
            other => other.to_string(),
        };
        Self::Unknown { message, help, wrong }
    }
}

/// Where the commit comes from that a revision stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    ByHub,
    /// The hub was not asked.
    Unasked,
    /// The hub was asked in vain.
    InVain,
}

/// The hub, its mirror or its cache, as the environment says.
pub struct Hub {
    client: Option<Client>,
    cache: PathBuf,
}

/// Where a program's settings come from; tests have their own.
pub type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Hub {
    /// As the environment says; `patience` is the longest wait for the next byte.
    pub fn from_env(patience: Duration) -> Self {
        Self::new(&|name| env::var(name).ok().filter(|value| !value.is_empty()), patience)
    }

    pub fn new(variables: Variables, patience: Duration) -> Self {
        let home = || match variables("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => match variables("XDG_CACHE_HOME") {
                Some(cache) => Path::new(&cache).join("huggingface"),
                None => Path::new(&variables("HOME").unwrap_or_default()).join(".cache/huggingface"),
            },
        };
        let cache = variables("HF_HUB_CACHE").map_or_else(|| home().join("hub"), PathBuf::from);
        let is_on = |name| {
            variables(name).is_some_and(|v| matches!(v.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true"))
        };
        let offline = is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE");
        let token = || {
            let kept = || fs::read_to_string(home().join("token")).ok();
            variables("HF_TOKEN").or_else(kept).map(|t| t.trim().to_owned()).filter(|t| !t.is_empty())
        };
        let endpoint = variables("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let client = (!offline).then(|| Client::new(endpoint.trim_end_matches('/'), token(), patience));
        Self { client, cache }
    }

    /// Lets a stop end what is asked of it, with [`StageError::Stopped`], those requests too that are under way.
    pub fn until(mut self, stop: &StopFlag) -> Self {
        self.client = self.client.map(|client| client.until(stop.clone()));
        self
    }

    /// The commit that a repository's revision stands for at this moment. Offline, or when the hub cannot be reached,
    /// the one that it stood for when it was last asked.
    ///
    /// # Errors
    /// There is no such repository or revision, it asks for a token, or nothing is known about it and the hub cannot
    /// be reached.
    pub fn resolve(&self, repository: &str, revision: &str) -> Result<String, StageError> {
        self.resolve_or_recall(repository, revision).map(|(commit, _)| commit)
    }

    /// Whether it may be asked.
    pub fn is_on(&self) -> bool {
        self.client.is_some()
    }

    /// [`Hub::resolve`], and who says so.
    fn resolve_or_recall(&self, repository: &str, revision: &str) -> Result<(String, Told), StageError> {
        if is_commit(revision) {
            return Ok((revision.to_owned(), Told::Unasked));
        }
        let folder = cache::Repository::new(&self.cache, repository);
        let known = folder.known_commit(revision);
        let Some(client) = &self.client else {
            let commit = known.ok_or_else(|| not_kept(repository, revision, &self.cache))?;
            return Ok((commit, Told::Unasked));
        };
        match client.describe(repository, revision) {
            Ok(description) => {
                // A cache that cannot be written to serves as well, as long as the hub can be reached.
                if let Err(error) = folder.remember_commit(revision, &description.commit) {
                    tracing::warn!(repository, revision, %error, "the commit is not remembered");
                }
                Ok((description.commit, Told::ByHub))
            }
            Err(error @ StageError::Network { .. }) => match known {
                Some(commit) => {
                    tracing::warn!(repository, revision, %commit, %error, "the hub has no answer; taking the commit known");
                    Ok((commit, Told::InVain))
                }
                None => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// The folder of a commit's files; fetches what the cache lacks of configuration, tokenizer and weights.
    /// `progress(bytes done, bytes in all)` is called now and then, and may stop it by an error.
    ///
    /// # Errors
    /// The hub cannot be reached, a file is not what the hub says it is, the disk.
    pub fn fetch(
        &self,
        repository: &str,
        commit: &str,
        progress: &mut dyn FnMut(u64, u64) -> Result<(), StageError>,
    ) -> Result<PathBuf, StageError> {
        let folder = cache::Repository::new(&self.cache, repository);
        let snapshot = folder.snapshot(commit);
        if folder.is_complete(commit) {
            return Ok(snapshot);
        }
        let client = self.client.as_ref().ok_or_else(|| not_kept(repository, commit, &self.cache))?;
        let description = client.describe(repository, commit)?;
        let files: Vec<&client::RemoteFile> = description.files.iter().filter(|f| is_wanted(&f.path)).collect();
        if !files.iter().any(|f| f.path.ends_with(".safetensors")) {
            return Err(StageError::params(format!("`{repository}` has no weights in safetensors files"))
                .help("use a revision that has them, or convert the model and give its folder"));
        }
        let all: u64 = files.iter().map(|f| f.size).sum();
        let mut before = 0;
        for file in files {
            folder.place(commit, file, client, &mut |done| progress(before + done, all))?;
            before += file.size;
            progress(before, all)?;
        }
        // Everything is there: without the mark it is only looked at again next time.
        if let Err(error) = folder.mark_complete(commit) {
            tracing::warn!(repository, commit, %error, "the commit is not marked as complete");
        }
        Ok(snapshot)
    }

    /// Resolves a name: what enters an action key, and what a worker is told.
    ///
    /// # Errors
    /// As [`Hub::resolve`]; a folder that is not there.
    pub fn pin(&self, name: &ModelName) -> Result<PinnedModel, StageError> {
        match name {
            ModelName::Folder(folder) if !folder.is_dir() => {
                Err(StageError::input(folder, "is not a folder").help("give a model's folder, or `organisation/name`"))
            }
            ModelName::Folder(folder) => Ok(PinnedModel::Folder(folder.clone())),
            ModelName::Hub { repository, revision } => match self.resolve_or_recall(repository, revision)? {
                (commit, Told::ByHub) => Ok(PinnedModel::Hub { repository: repository.clone(), commit }),
                (commit, Told::Unasked) => self.pin_unasked(repository, commit, self.client.as_ref()),
                (commit, Told::InVain) => self.pin_unasked(repository, commit, None),
            },
        }
    }

    /// A commit that the hub was not asked about, and is now where it may be. One that another program fetched, in part
    /// perhaps, is known by its files when the hub cannot be asked for the rest.
    fn pin_unasked(
        &self,
        repository: &str,
        commit: String,
        client: Option<&Client>,
    ) -> Result<PinnedModel, StageError> {
        let folder = cache::Repository::new(&self.cache, repository);
        let pinned = |commit| Ok(PinnedModel::Hub { repository: repository.to_owned(), commit });
        if folder.is_complete(&commit) {
            return pinned(commit);
        }
        match client.map(|client| client.describe(repository, &commit)) {
            Some(Ok(_)) => return pinned(commit),
            Some(Err(error)) if !matches!(error, StageError::Network { .. }) => return Err(error),
            _ => {}
        }
        let snapshot = folder.snapshot(&commit);
        if snapshot.join("config.json").exists() {
            tracing::info!(repository, %commit, "another program put it there: it is known by its files");
            return Ok(PinnedModel::Folder(snapshot));
        }
        // A commit says what the model is, and its results may be there already.
        pinned(commit)
    }

    /// The folder of a pinned model, fetched where needed.
    ///
    /// # Errors
    /// As [`Hub::fetch`].
    pub fn open(
        &self,
        model: &PinnedModel,
        progress: &mut dyn FnMut(u64, u64) -> Result<(), StageError>,
    ) -> Result<PathBuf, StageError> {
        match model {
            PinnedModel::Folder(folder) => Ok(folder.clone()),
            PinnedModel::Hub { repository, commit } => self.fetch(repository, commit, progress),
            PinnedModel::Unknown { message, help, wrong: true } => {
                Err(StageError::Params { message: message.clone(), help: help.clone() })
            }
            PinnedModel::Unknown { message, help, wrong: false } => {
                Err(StageError::Network { message: message.clone(), help: help.clone() })
            }
        }
    }
}

/// What a folder in the hub's cache lacks, if it is not known whether its repository has such a file: another program
/// fetched the folder, and did not look for it.
pub fn is_unknown_whether_there(folder: &Path, file: &str) -> bool {
    let Some((commit, root)) = folder.file_name().zip(folder.parent().and_then(Path::parent)) else { return false };
    let is_snapshot = folder.parent().is_some_and(|parent| parent.ends_with("snapshots"));
    is_snapshot
        && !folder.join(file).exists()
        && !root.join(".grlm").join(commit).exists()
        // Where `huggingface_hub` notes what it asked for in vain.
        && !root.join(".no_exist").join(commit).join(file).exists()
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Configuration, tokenizer and weights; not other frameworks' weights, nor pictures.
fn is_wanted(path: &str) -> bool {
    let depth = path.matches('/').count();
    let ends = |endings: &[&str]| endings.iter().any(|e| path.ends_with(e));
    match depth {
        0 => ends(&[".safetensors", ".json", ".jinja", ".txt", ".model"]),
        // sentence-transformers keeps pooling in folders of their own.
        1 => path.ends_with("_Pooling/config.json"),
        _ => false,
    }
}

fn not_kept(repository: &str, revision: &str, cache: &Path) -> StageError {
    StageError::params(format!(
        "`{repository}` at `{revision}` is not in {}, and the hub is switched off",
        cache.display()
    ))
    .help("unset HF_HUB_OFFLINE once to fetch it, or give the model's folder")
}
