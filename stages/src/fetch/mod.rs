//! Stage `fetch`: one file, from a path on disk or an http(s) address, checked against the digest that its publisher
//! (or its user) gave.
//!
//! A download that breaks off is resumed where it stopped, within an attempt and by the next one; addresses that fail
//! in passing are tried again with growing pauses, the others in turn. Without a digest an address is taken at its
//! word, once: the result is kept like any other, so such an address should name one content for ever (a commit, a
//! version).

use std::{fs, path::Path, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Artifact, ParamIssue, Ports, Stage, StageContext, StageError,
    artifact::text,
    stage::{Input, Output},
};

mod digest;
mod download;
#[cfg(test)]
mod server;

pub use digest::Digest;
use download::Downloader;

pub struct Fetch;

/// Parameters of `fetch`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// Where the file is: an address (`https://…`, `http://…`) or a path on disk. With the input `file` connected, or
    /// left empty, nothing is fetched: the file is that input.
    #[serde(default)]
    pub from: String,
    /// Further addresses or paths of the same file, tried in this order when the first does not give it.
    #[serde(default)]
    pub mirrors: Vec<String>,
    /// What the file's content must be: `blake3:…`, `sha256:…`, or `git-blob:…` (the SHA-1 under which git keeps the
    /// file), in hexadecimal digits. An address may go without, a path may not.
    #[serde(default)]
    pub digest: Option<Digest>,
    /// What the file is called here; by default the last part of `from`.
    #[serde(default)]
    pub file: Option<String>,
    /// How often each address is tried before the stage fails. Pauses between the tries double from one second.
    #[serde(default = "default_tries")]
    pub tries: u32,
    /// Longest wait for the next byte, in seconds.
    #[serde(default = "default_patience")]
    pub patience: u32,
}

fn default_tries() -> u32 {
    4
}

fn default_patience() -> u32 {
    60
}

/// One place where the file may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place<'a> {
    Address(&'a str),
    Path(&'a Path),
}

impl<'a> Place<'a> {
    /// # Errors
    /// A scheme that is not understood, in words.
    fn parse(text: &'a str) -> Result<Self, String> {
        match text.split_once("://") {
            Some(("http" | "https", rest)) if !rest.is_empty() => Ok(Self::Address(text)),
            Some(("file", path)) => Ok(Self::Path(Path::new(path))),
            Some((scheme, _)) if scheme.chars().all(|c| c.is_ascii_alphanumeric()) => {
                Err(format!("`{scheme}` addresses cannot be fetched"))
            }
            _ if text.is_empty() => Err("neither an address nor a path".into()),
            _ => Ok(Self::Path(Path::new(text))),
        }
    }
}

impl Params {
    fn places(&self) -> impl Iterator<Item = (String, &str)> {
        let mirrors = self.mirrors.iter().enumerate().map(|(i, m)| (format!("mirrors[{i}]"), m.as_str()));
        let from = Some(("from".to_owned(), self.from.as_str())).filter(|_| !self.from.is_empty());
        from.into_iter().chain(mirrors)
    }

    /// The last part of `from`, without a query; `file` where that gives no name.
    fn file_name(&self) -> String {
        if let Some(name) = &self.file {
            return name.clone();
        }
        let path = self.from.split_once("://").map_or(self.from.as_str(), |(_, rest)| rest);
        let path = path.split(['?', '#']).next().unwrap_or_default();
        match path.trim_end_matches('/').rsplit_once('/') {
            Some((_, name)) if is_file_name(name) => name.to_owned(),
            None if is_file_name(path) && !self.from.contains("://") => path.to_owned(),
            _ => "file".to_owned(),
        }
    }
}

fn is_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains('/')
}

impl Stage for Fetch {
    const KIND: &'static str = "fetch";
    const SUMMARY: &'static str = "a file from an address or a path, checked against its digest";
    type Params = Params;

    fn ports(params: &Params) -> Ports {
        const LOCAL: (&str, &str) = ("file", "the file itself, on this machine: taken instead of fetching it");
        let local = match params.from.as_str() {
            "" => Input::required(LOCAL.0, Artifact::Any, LOCAL.1),
            _ => Input::optional(LOCAL.0, Artifact::Any, LOCAL.1),
        };
        Ports::new([local], [Output::new("file", Artifact::Any, params.file_name(), "the file")])
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let mut issues = Vec::new();
        for (path, text) in params.places() {
            match Place::parse(text) {
                Err(message) => {
                    issues.push(ParamIssue::new(path, message).help("give an http(s) address or a path on disk"));
                }
                Ok(Place::Path(_)) if params.digest.is_none() => issues.push(
                    ParamIssue::new("digest", format!("`{text}` is a path, whose content may change without notice"))
                        .help("give its digest, or connect the file itself: `inputs: { file: { file: PATH } }`"),
                ),
                Ok(_) => {}
            }
        }
        if params.file.as_deref().is_some_and(|name| !is_file_name(name)) {
            issues.push(ParamIssue::new("file", "not the name of a file"));
        }
        if params.tries == 0 {
            issues.push(ParamIssue::new("tries", "at least one try is needed"));
        }
        if params.patience == 0 {
            issues.push(ParamIssue::new("patience", "no server answers in no time"));
        }
        issues
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let output = cx.output("file")?.to_owned();
        if let Some(local) = cx.optional_input("file") {
            return copy(local, &output, params.digest.as_ref());
        }
        let mut complaints: Vec<StageError> = Vec::new();
        let mut addresses = Vec::new();
        for (_, text) in params.places() {
            match Place::parse(text).map_err(StageError::params)? {
                Place::Address(address) => addresses.push(address),
                Place::Path(path) => match copy(path, &output, params.digest.as_ref()) {
                    Ok(()) => return Ok(()),
                    Err(error) => {
                        let _ = fs::remove_file(&output);
                        complaints.push(error);
                    }
                },
            }
        }
        if !addresses.is_empty() {
            let downloader = Downloader::new(params.tries, Duration::from_secs(u64::from(params.patience)));
            match downloader.download(&addresses, params.digest.as_ref(), cx) {
                Ok(part) => {
                    if params.digest.is_none() {
                        let digest = Digest::blake3_of(&part)?;
                        cx.warn(format!("nothing vouches for the file; its digest is {digest}"));
                    }
                    return move_into(&part, &output);
                }
                Err(StageError::Stopped) => return Err(StageError::Stopped),
                Err(error) => complaints.push(error),
            }
        }
        let words: Vec<String> = complaints.iter().map(ToString::to_string).collect();
        let Some(last) = complaints.pop() else { return Err(StageError::bug("no place to fetch from")) };
        if words.len() == 1 {
            return Err(last);
        }
        let help = last.help_text().unwrap_or_default().to_owned();
        Err(match last {
            StageError::Network { .. } => StageError::Network { message: words.join("; "), help: Some(help) },
            _ => StageError::params(words.join("; ")).help(help),
        })
    }
}

/// Copies a file of the user's and checks it.
fn copy(from: &Path, to: &Path, digest: Option<&Digest>) -> Result<(), StageError> {
    if from.is_dir() {
        return Err(StageError::input(from, "a folder, where a file is expected"));
    }
    fs::copy(from, to).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound if !from.exists() => {
            StageError::input(from, "no such file").help("put it there, or set `with.from` to where it is")
        }
        std::io::ErrorKind::NotFound | std::io::ErrorKind::StorageFull => StageError::io("write", to, e),
        _ => text::open_error(from, e),
    })?;
    match digest {
        Some(digest) => digest.check(to).map_err(|e| e.of(&from.display().to_string())),
        None => Ok(()),
    }
}

/// Renames where the disk is the same, copies otherwise.
fn move_into(part: &Path, output: &Path) -> Result<(), StageError> {
    fs::rename(part, output)
        .or_else(|_| fs::copy(part, output).map(|_| ()))
        .map_err(|e| StageError::io("write", output, e))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        server::{Answer, Server},
        *,
    };
    use crate::testing::{Bench, refuses};

    const CONTENT: &[u8] = b"id,title\n1,soap\n";
    /// `git hash-object` of the above.
    const GIT_BLOB: &str = "git-blob:951833726c871fea753a8530907487e61eedb3d9";

    fn blake3() -> String {
        format!("blake3:{}", blake3::hash(CONTENT).to_hex())
    }

    #[test]
    fn a_path_is_copied_and_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("items.csv");
        fs::write(&path, CONTENT).unwrap();
        let ran = Bench::new().run("fetch", json!({"from": path, "digest": blake3()})).unwrap();
        assert_eq!(fs::read(ran.path("file")).unwrap(), CONTENT);
        assert!(ran.path("file").ends_with("items.csv"));
        let wrong = json!({"from": path, "digest": format!("blake3:{}", "0".repeat(64))});
        refuses(Bench::new().run("fetch", wrong), &["items.csv", "its blake3 is", "wanted"]);
        let absent = json!({"from": folder.path().join("none"), "digest": blake3()});
        refuses(Bench::new().run("fetch", absent), &["none: no such file", "with.from"]);
        refuses(Bench::new().run("fetch", json!({"from": folder.path(), "digest": blake3()})), &["a folder"]);
        let bench = Bench::new().input("file", CONTENT);
        assert!(bench.run("fetch", json!({})).is_ok(), "a connected file needs no digest");
        assert!(bench.run("fetch", json!({"from": "http://nowhere.invalid/x", "digest": blake3()})).is_ok());
        let second = json!({"from": folder.path().join("none"), "mirrors": [path], "digest": blake3()});
        assert!(Bench::new().run("fetch", second).is_ok());
    }

    #[test]
    fn an_address_is_fetched_under_its_own_name() {
        let server = Server::start(CONTENT, vec![]);
        let from = server.address("data/items.csv?raw=1");
        let ran = Bench::new().run("fetch", json!({"from": from, "digest": blake3()})).unwrap();
        assert_eq!(fs::read(ran.path("file")).unwrap(), CONTENT);
        assert!(ran.path("file").ends_with("items.csv"));
        assert!(ran.logs().is_empty());
        let ran = Bench::new().run("fetch", json!({"from": from, "file": "x.csv"})).unwrap();
        assert!(ran.path("file").ends_with("x.csv"));
        assert_eq!(ran.logs(), [format!("nothing vouches for the file; its digest is {}", blake3())]);
    }

    #[test]
    fn all_kinds_of_digests_are_checked() {
        let server = Server::start(CONTENT, vec![]);
        use sha2::Digest as _;
        let sha256 = format!("sha256:{:x}", sha2::Sha256::digest(CONTENT));
        for digest in [blake3(), sha256, GIT_BLOB.to_owned()] {
            let ran = Bench::new().run("fetch", json!({"from": server.address("x"), "digest": digest}));
            assert!(ran.is_ok(), "{digest}: {ran:?}");
        }
        let other = GIT_BLOB.replace('9', "0");
        let ran = Bench::new().run("fetch", json!({"from": server.address("x"), "digest": other}));
        refuses(ran, &["its git-blob is", GIT_BLOB.split_once(':').unwrap().1, "wanted"]);
    }

    #[test]
    fn what_is_not_there_is_said_and_mirrors_help() {
        let gone = Server::start(CONTENT, vec![Answer::Status(404); 9]);
        let with = json!({"from": gone.address("x"), "digest": blake3()});
        refuses(Bench::new().run("fetch", with), &["answered 404"]);
        assert_eq!(gone.requests().len(), 1, "no second try: the answer will not change");
        let good = Server::start(CONTENT, vec![]);
        let with = json!({"from": gone.address("x"), "mirrors": [good.address("y")], "digest": blake3()});
        assert!(Bench::new().run("fetch", with).is_ok());
    }

    #[test]
    fn parameters_are_checked_before_anything_runs() {
        let issues = |params: serde_json::Value| -> Vec<String> {
            crate::kind("fetch").unwrap().resolve_params(&params).unwrap_err().into_iter().map(|i| i.path).collect()
        };
        assert_eq!(issues(json!({"from": "s3://bucket/x", "digest": blake3()})), ["from"]);
        assert_eq!(issues(json!({"from": "x.csv"})), ["digest"]);
        let needs = |params: Params| Fetch::ports(&params).inputs[0].required;
        assert!(needs(serde_json::from_value(json!({})).unwrap()));
        assert!(!needs(serde_json::from_value(json!({"from": "http://h/x"})).unwrap()));
        assert_eq!(issues(json!({"from": "http://h/x", "mirrors": ["", "ftp://h"]})), ["mirrors[0]", "mirrors[1]"]);
        assert_eq!(issues(json!({"from": "http://h/x", "digest": "md5:00"})), ["digest"]);
        assert_eq!(issues(json!({"from": "http://h/x", "file": "../x", "tries": 0})), ["file", "tries"]);
        let name = |from: &str| {
            let params = Params { file: None, ..serde_json::from_value(json!({"from": from})).unwrap() };
            params.file_name()
        };
        assert_eq!(
            ["http://h/a/b.json?x=/y", "http://h", "http://h/..", "b.json", "a/b.json"].map(name),
            ["b.json", "file", "file", "b.json", "b.json"]
        );
    }
}
