//! Against a hub on this machine that misbehaves on request.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

use serde_json::json;
use sha1::Digest as _;

use super::*;
use crate::Failure;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the next request for a path gets, instead of the answer.
enum Trick {
    Status(u16),
    /// Status 429 with this header.
    Limited(&'static str),
    BreakAfter(usize),
    /// A stop, and then no answer until the client gives up.
    StopAndHang(StopFlag),
    /// The same after so many bytes of the answer.
    StopAndHangAfter(usize, StopFlag),
    Garbage,
    /// A page instead of what was asked for.
    Page,
    /// The same without its length.
    UnmeasuredPage,
    Redirect(String),
}

struct Server {
    address: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    tricks: Vec<(String, Trick)>,
    token: Option<String>,
    /// Paths asked for, with the range.
    asked: Vec<String>,
}

impl Server {
    fn start(files: &[(&str, Vec<u8>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let files = files.iter().map(|(n, c)| ((*n).to_owned(), c.clone())).collect();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = answer(stream, &shared);
            }
        });
        Self { address, state }
    }

    fn trick(&self, path: &str, trick: Trick) {
        self.state.lock().unwrap().tricks.push((path.to_owned(), trick));
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().asked)
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut range, mut token) = (0, None);
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => range = value.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap(),
            "authorization" => token = Some(value.trim_start_matches("Bearer ").to_owned()),
            _ => {}
        }
    }
    let mut state = state.lock().unwrap();
    state.asked.push(if range > 0 { format!("{path} from {range}") } else { path.clone() });
    let trick = state.tricks.iter().position(|(p, _)| path.contains(p.as_str())).map(|i| state.tricks.remove(i).1);
    let wrong_token = state.token.is_some() && state.token != token;
    let body = if path.starts_with("/api/models/org/tiny/revision/") {
        let siblings: Vec<_> = state
            .files
            .iter()
            .map(|(name, content)| {
                if name.ends_with(".safetensors") {
                    let sha256: String = sha2::Sha256::digest(content).iter().map(|b| format!("{b:02x}")).collect();
                    json!({"rfilename": name, "size": content.len(), "blobId": "0".repeat(40), "lfs": {"sha256": sha256}})
                } else {
                    let whole = [format!("blob {}\0", content.len()).into_bytes(), content.clone()].concat();
                    let sha1: String = sha1::Sha1::digest(whole).iter().map(|b| format!("{b:02x}")).collect();
                    json!({"rfilename": name, "size": content.len(), "blobId": sha1})
                }
            })
            .collect();
        Some(json!({"sha": COMMIT, "siblings": siblings}).to_string().into_bytes())
    } else {
        let file = path.split('?').next().and_then(|path| path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/")));
        file.and_then(|name| state.files.get(name).cloned())
    };
    drop(state);
    let more = match &trick {
        Some(Trick::Limited(header)) => format!("{header}\r\n"),
        Some(Trick::Redirect(target)) => format!("Location: {target}\r\n"),
        _ => String::new(),
    };
    let (status, body) = match (trick, body) {
        (Some(Trick::Status(status)), _) => (status, Vec::new()),
        (Some(Trick::Limited(_)), _) => (429, Vec::new()),
        (Some(Trick::Redirect(_)), _) => (302, b"Found".to_vec()),
        (Some(Trick::Page), _) => (200, b"<html>Sign in</html>".to_vec()),
        _ if wrong_token => (401, Vec::new()),
        (Some(Trick::UnmeasuredPage), _) => {
            return stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n<html>Sign in</html>");
        }
        (Some(Trick::StopAndHang(stop)), _) => {
            stop.stop();
            return std::io::copy(&mut stream, &mut std::io::sink()).map(drop);
        }
        (Some(Trick::StopAndHangAfter(count, stop)), Some(body)) => {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            stream.write_all(&[head.as_bytes(), &body[..count]].concat())?;
            stop.stop();
            return std::io::copy(&mut stream, &mut std::io::sink()).map(drop);
        }
        (Some(Trick::Garbage), Some(body)) => (200, vec![b'x'; body.len()]),
        (Some(Trick::BreakAfter(count)), Some(body)) => {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            stream.write_all(&[head.as_bytes(), &body[..count]].concat())?;
            return Ok(());
        }
        (_, Some(body)) if range > 0 => (206, body[range..].to_vec()),
        (_, Some(body)) => (200, body),
        (_, None) => (404, Vec::new()),
    };
    let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n{more}Connection: close\r\n\r\n", body.len());
    stream.write_all(&[head.as_bytes(), &body].concat())
}

fn weights() -> Vec<u8> {
    (0..200_000u32).map(|i| (i % 251) as u8).collect()
}

fn server() -> Server {
    Server::start(&[
        ("config.json", b"{}".to_vec()),
        ("model.safetensors", weights()),
        ("1_Pooling/config.json", b"{\"a\": 1}".to_vec()),
        ("onnx/model.json", b"no".to_vec()),
        ("pytorch_model.bin", b"no".to_vec()),
    ])
}

fn hub_with(server: &str, cache: &Path, more: &[(&str, &str)]) -> Hub {
    let variables = |name: &str| match name {
        "HF_ENDPOINT" => Some(server.to_owned()),
        "HF_HOME" => Some(cache.display().to_string()),
        _ => more.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()),
    };
    Hub::new(&variables, Duration::from_secs(3))
}

fn fetch(hub: &Hub) -> Result<PathBuf, StageError> {
    let commit = hub.resolve("org/tiny", MAIN)?;
    assert_eq!(commit, COMMIT);
    hub.fetch("org/tiny", &commit, &mut |_, _| Ok(()))
}

#[test]
fn names_are_folders_or_repositories() {
    let hub = |repository: &str, revision: &str| {
        Ok(ModelName::Hub { repository: repository.into(), revision: revision.into() })
    };
    assert_eq!(ModelName::parse("Qwen/Qwen3-4B"), hub("Qwen/Qwen3-4B", "main"));
    assert_eq!(ModelName::parse("Qwen/Qwen3-4B@refs/pr/3"), Ok(ModelName::Folder("Qwen/Qwen3-4B@refs/pr/3".into())));
    assert_eq!(ModelName::parse("Qwen/Qwen3-4B@v1.0"), hub("Qwen/Qwen3-4B", "v1.0"));
    assert_eq!(ModelName::parse("./model"), Ok(ModelName::Folder("./model".into())));
    assert_eq!(ModelName::parse("/data/model"), Ok(ModelName::Folder("/data/model".into())));
    for wrong in ["", "Qwen3", "a/b@", "a b/c", "a/.."] {
        assert!(ModelName::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_model_is_fetched_once_and_shared() {
    let (server, home) = (server(), tempfile::tempdir().unwrap());
    let hub = hub_with(&server.address, home.path(), &[]);
    let mut seen = Vec::new();
    let commit = hub.resolve("org/tiny", MAIN).unwrap();
    let folder = hub
        .fetch("org/tiny", &commit, &mut |done, all| {
            seen.push((done, all));
            Ok(())
        })
        .unwrap();
    assert_eq!(folder, home.path().join(format!("hub/models--org--tiny/snapshots/{COMMIT}")));
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    assert_eq!(fs::read(folder.join("1_Pooling/config.json")).unwrap(), b"{\"a\": 1}");
    assert!(!folder.join("pytorch_model.bin").exists() && !folder.join("onnx").exists());
    assert!(seen.is_sorted() && seen.last().is_some_and(|(done, all)| done == all), "{seen:?}");
    server.asked();
    fetch(&hub).unwrap();
    assert_eq!(server.asked(), ["/api/models/org/tiny/revision/main?blobs=true"]);
    // A commit needs no question at all.
    assert_eq!(hub.resolve("org/tiny", COMMIT).unwrap(), COMMIT);
    hub.fetch("org/tiny", COMMIT, &mut |_, _| Ok(())).unwrap();
    assert!(server.asked().is_empty());
}

#[test]
fn offline_takes_what_is_there_and_says_what_is_not() {
    let (server, home) = (server(), tempfile::tempdir().unwrap());
    let offline = || hub_with(&server.address, home.path(), &[("HF_HUB_OFFLINE", "1")]);
    let error = fetch(&offline()).unwrap_err();
    assert!(error.to_string().contains("is not in"), "{error}");
    let folder = fetch(&hub_with(&server.address, home.path(), &[])).unwrap();
    server.asked();
    assert_eq!(fetch(&offline()).unwrap(), folder);
    assert!(server.asked().is_empty());
    // A hub that cannot be reached is as good as none.
    assert_eq!(fetch(&hub_with("http://127.0.0.1:1", home.path(), &[])).unwrap(), folder);
    let error = fetch(&hub_with("http://127.0.0.1:1", tempfile::tempdir().unwrap().path(), &[])).unwrap_err();
    assert_eq!(error.failure(), Failure::Environment);
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let (server, home) = (server(), tempfile::tempdir().unwrap());
    server.trick("model.safetensors", Trick::BreakAfter(120_000));
    server.trick("revision", Trick::Status(503));
    let folder = fetch(&hub_with(&server.address, home.path(), &[])).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    assert!(server.asked().iter().any(|a| a.contains("model.safetensors from ")));
}

#[test]
fn a_hub_that_limits_requests_gets_the_pause_that_it_asks_for() {
    let (server, home) = (server(), tempfile::tempdir().unwrap());
    server.trick("revision", Trick::Limited("Retry-After: 0.4"));
    for header in ["Retry-After: 0.4", "Retry-After: 0.2", "RateLimit: \"resolvers\";r=0;t=1", "Retry-After: 0", "X: y"]
    {
        server.trick("model.safetensors", Trick::Limited(header));
    }
    let start = std::time::Instant::now();
    let folder = fetch(&hub_with(&server.address, home.path(), &[])).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    assert!(start.elapsed() >= Duration::from_secs(2), "{:?}", start.elapsed());
    server.trick("model.safetensors", Trick::Limited("Retry-After: 600"));
    let (hub, mut calls) = (hub_with(&server.address, tempfile::tempdir().unwrap().path(), &[]), 0);
    let stopped = hub.fetch("org/tiny", COMMIT, &mut |_, _| {
        calls += 1;
        if calls > 6 { Err(StageError::Stopped) } else { Ok(()) }
    });
    assert!(matches!(stopped, Err(StageError::Stopped)), "a stop ends the pause");
}

/// Nobody waits for a hub that hangs: a stop that does not come through is told by the test's own limit.
#[test]
fn a_stop_cuts_off_what_is_under_way() {
    type Stopping = fn(StopFlag) -> Trick;
    let stops: [(&str, Stopping); 4] = [
        ("revision", Trick::StopAndHang),
        ("model.safetensors", Trick::StopAndHang),
        ("revision", |stop| Trick::StopAndHangAfter(10, stop)),
        ("model.safetensors", |stop| Trick::StopAndHangAfter(120_000, stop)),
    ];
    for (path, trick) in stops {
        let (server, home, stop) = (server(), tempfile::tempdir().unwrap(), StopFlag::default());
        server.trick(path, trick(stop.clone()));
        let variables = |name: &str| match name {
            "HF_ENDPOINT" => Some(server.address.clone()),
            "HF_HOME" => Some(home.path().display().to_string()),
            _ => None,
        };
        let hub = Hub::new(&variables, Duration::from_secs(86_400)).until(&stop);
        let ended = hub.fetch("org/tiny", COMMIT, &mut |_, _| Ok(()));
        assert!(matches!(ended, Err(StageError::Stopped)), "{path}: {ended:?}");
    }
}

/// As `AutoModel.from_pretrained` leaves it: without what it does not need.
#[test]
fn what_another_program_fetched_in_part_is_no_commit() {
    let (server, home) = (server(), tempfile::tempdir().unwrap());
    let repository = home.path().join("hub/models--org--tiny");
    let snapshot = repository.join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir(repository.join("refs")).unwrap();
    fs::write(repository.join("refs/main"), COMMIT).unwrap();
    fs::write(snapshot.join("config.json"), "{}").unwrap();
    let commit = PinnedModel::Hub { repository: "org/tiny".into(), commit: COMMIT.into() };
    let offline = hub_with(&server.address, home.path(), &[("TRANSFORMERS_OFFLINE", "1")]);
    let unreachable = hub_with("http://127.0.0.1:1", home.path(), &[]);
    for name in ["org/tiny".to_owned(), format!("org/tiny@{COMMIT}")] {
        let name = ModelName::parse(&name).unwrap();
        for hub in [&offline, &unreachable] {
            assert_eq!(hub.pin(&name).unwrap(), PinnedModel::Folder(snapshot.clone()));
            assert!(hub.open(&commit, &mut |_, _| Ok(())).is_err(), "under the commit's name it will not do");
        }
        assert_eq!(hub_with(&server.address, home.path(), &[]).pin(&name).unwrap(), commit);
    }
    let lacks = |file| is_unknown_whether_there(&snapshot, file);
    assert!(lacks("modules.json") && !lacks("config.json") && !is_unknown_whether_there(home.path(), "modules.json"));
    fs::create_dir_all(repository.join(".no_exist").join(COMMIT)).unwrap();
    fs::write(repository.join(".no_exist").join(COMMIT).join("modules.json"), "").unwrap();
    assert!(!lacks("modules.json") && lacks("1_Pooling/config.json"));
    fetch(&hub_with(&server.address, home.path(), &[])).unwrap();
    assert!(!lacks("generation_config.json"), "the hub was asked");
    assert_eq!(offline.pin(&ModelName::parse("org/tiny").unwrap()).unwrap(), commit);
}

#[test]
fn a_file_with_another_digest_is_fetched_again_and_never_kept() {
    let (server, home) = (server(), tempfile::tempdir().unwrap());
    server.trick("model.safetensors", Trick::Garbage);
    let hub = hub_with(&server.address, home.path(), &[]);
    let folder = fetch(&hub).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    let other = tempfile::tempdir().unwrap();
    server.trick("model.safetensors", Trick::Garbage);
    server.trick("model.safetensors", Trick::Garbage);
    let error = fetch(&hub_with(&server.address, other.path(), &[])).unwrap_err();
    assert!(error.to_string().contains("`model.safetensors`"), "{error}");
    assert!(!other.path().join(format!("hub/models--org--tiny/snapshots/{COMMIT}/model.safetensors")).exists());
}

#[test]
fn what_the_hub_refuses_is_said_once_with_what_to_do() {
    let (server, home) = (server(), tempfile::tempdir().unwrap());
    server.state.lock().unwrap().token = Some("secret".into());
    let error = fetch(&hub_with(&server.address, home.path(), &[])).unwrap_err();
    assert!(error.help_text().is_some_and(|h| h.contains("HF_TOKEN")), "{error}");
    assert_eq!(server.asked().len(), 1);
    let error = fetch(&hub_with(&server.address, home.path(), &[("HF_TOKEN", "other")])).unwrap_err();
    assert!(!format!("{error} {:?}", error.help_text()).contains("other"), "a token must not be shown");
    fs::write(home.path().join("token"), "secret\n").unwrap();
    fetch(&hub_with(&server.address, home.path(), &[])).unwrap();
    let error = hub_with(&server.address, home.path(), &[]).resolve("org/none", MAIN).unwrap_err();
    assert_eq!(error.failure(), Failure::WrongInput);
    let bare = Server::start(&[("config.json", b"{}".to_vec())]);
    let error = fetch(&hub_with(&bare.address, tempfile::tempdir().unwrap().path(), &[])).unwrap_err();
    assert!(error.to_string().contains("no weights in safetensors"), "{error}");
}

#[test]
fn each_fault_is_told_with_what_helps_against_it() {
    let (server, home) = (server(), tempfile::tempdir().unwrap());
    let resolved = |tricks: [Trick; 3]| {
        tricks.into_iter().for_each(|trick| server.trick("revision", trick));
        let error = hub_with(&server.address, home.path(), &[]).resolve("org/tiny", MAIN).unwrap_err();
        assert_eq!((error.failure(), server.asked().len()), (Failure::Environment, 3));
        (error.to_string(), error.help_text().unwrap().to_owned())
    };
    let (said, help) = resolved([500, 502, 503].map(Trick::Status));
    assert!(said.starts_with("network: http://") && said.ends_with(": status 503"), "{said}");
    assert!(help.contains("is in trouble: try again later") && !help.contains("without network"), "{help}");
    let (_, help) = resolved(["Retry-After: 0"; 3].map(Trick::Limited));
    assert!(help.contains("set HF_TOKEN"), "{help}");
    for junk in [|| Trick::Page, || Trick::Garbage] {
        let (said, help) = resolved([junk(), junk(), junk()]);
        assert!(said.contains("not a description of a model"), "{said}");
        assert!(help.contains(&format!("is {} (HF_ENDPOINT, if it is set) a hub?", server.address)), "{help}");
    }
    let (said, help) = resolved([3, 3, 3].map(Trick::BreakAfter));
    assert!(said.contains("broke off") && help.contains("breaks off"), "{said} {help}");
    let nobody = hub_with("http://127.0.0.1:1", home.path(), &[]);
    let error = nobody.resolve("org/tiny", MAIN).unwrap_err();
    assert!(error.to_string().contains("no connection"), "{error}");
    assert!(error.help_text().unwrap().starts_with("without network, put `org/tiny` on this machine"));
    let error = hub_with("no address", home.path(), &[]).resolve("org/tiny", MAIN).unwrap_err();
    assert!(error.failure() == Failure::WrongInput && error.help_text().unwrap().contains("HF_ENDPOINT"), "{error}");
}

#[test]
fn what_is_known_of_a_model_is_said_once_more_where_it_is_opened() {
    let home = tempfile::tempdir().unwrap();
    let hub = hub_with("http://127.0.0.1:1", home.path(), &[]);
    let error = hub.pin(&ModelName::parse("org/tiny").unwrap()).unwrap_err();
    let (said, help) = (error.to_string(), error.help_text().map(str::to_owned));
    let again = hub.open(&PinnedModel::unknown(error), &mut |_, _| Ok(())).unwrap_err();
    assert_eq!((again.to_string(), again.help_text().map(str::to_owned)), (said, help));
    assert_eq!(again.failure(), Failure::Environment);
}

#[test]
fn a_hub_without_an_answer_is_not_asked_about_the_commit_that_is_known() {
    let (server, home) = (server(), tempfile::tempdir().unwrap());
    let refs = home.path().join("hub/models--org--tiny/refs");
    fs::create_dir_all(&refs).unwrap();
    fs::write(refs.join("main"), COMMIT).unwrap();
    (0..3).for_each(|_| server.trick("revision", Trick::Status(500)));
    let pinned = hub_with(&server.address, home.path(), &[]).pin(&ModelName::parse("org/tiny").unwrap()).unwrap();
    assert_eq!(pinned, PinnedModel::Hub { repository: "org/tiny".into(), commit: COMMIT.into() });
    assert_eq!(server.asked().len(), 3);
}

#[test]
fn a_redirect_that_leads_nowhere_says_where_and_is_followed_once_for_a_description() {
    let (server, home) = (server(), tempfile::tempdir().unwrap());
    let main = "/api/models/org/tiny/revision/main";
    let resolve = || hub_with(&server.address, home.path(), &[]).resolve("org/tiny", MAIN);
    server.trick("revision", Trick::Redirect("http://127.0.0.1:1/there?signature=abc".into()));
    let error = resolve().unwrap_err();
    let help = error.help_text().unwrap().to_owned();
    assert!(help.starts_with("let `127.0.0.1:1` through, or set HF_ENDPOINT to a mirror, or put `org/tiny`"), "{help}");
    let error = error.to_string();
    assert!(error.contains("redirected to http://127.0.0.1:1/there: no connection"), "{error}");
    assert!(!error.contains("abc"), "{error}");
    assert_eq!(server.asked().len(), 1);
    (0..11).for_each(|_| server.trick("revision", Trick::Redirect(main.into())));
    let error = resolve().unwrap_err();
    assert!(error.to_string().contains(&format!("{}{main}: and on, after 10 redirects", server.address)), "{error}");
    assert!(error.help_text().unwrap().contains("login page"));
    assert_eq!(server.asked().len(), 11);
    server.trick("revision", Trick::Redirect("gopher://hole/".into()));
    let error = resolve().unwrap_err();
    assert!(error.to_string().contains("redirected to gopher://hole/: "), "{error}");
    assert_eq!(server.asked().len(), 1);
    // Files are often elsewhere, and what refuses a connection may take the next.
    (0..2).for_each(|_| server.trick("model.safetensors", Trick::Redirect("http://127.0.0.1:1/file".into())));
    server.trick("model.safetensors", Trick::Redirect(format!("/org/tiny/resolve/{COMMIT}/model.safetensors?x=1")));
    let folder = fetch(&hub_with(&server.address, home.path(), &[])).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
}

#[test]
fn a_token_is_told_the_hub_alone() {
    let (hub, other, home) = (server(), server(), tempfile::tempdir().unwrap());
    for server in [&hub, &other] {
        server.state.lock().unwrap().token = Some("secret".into());
    }
    let main = "/api/models/org/tiny/revision/main";
    let resolve = || hub_with(&hub.address, home.path(), &[("HF_TOKEN", "secret")]).resolve("org/tiny", MAIN);
    hub.trick("revision", Trick::Redirect(main.into()));
    assert_eq!(resolve().unwrap(), COMMIT);
    hub.trick("revision", Trick::Redirect(format!("{}{main}", other.address)));
    let error = resolve().unwrap_err().to_string();
    assert!(error.contains(&format!("redirected to {}{main}: status 401", other.address)), "{error}");
}

#[test]
fn a_page_in_place_of_a_file_is_no_beginning_of_it() {
    for page in [Trick::Page, Trick::UnmeasuredPage] {
        let (server, home) = (server(), tempfile::tempdir().unwrap());
        server.trick("model.safetensors", page);
        let folder = fetch(&hub_with(&server.address, home.path(), &[])).unwrap();
        assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
        let asked = server.asked();
        assert_eq!(asked.iter().filter(|path| path.contains("model.safetensors")).count(), 2);
        assert!(!asked.iter().any(|path| path.contains(" from ")), "{asked:?}");
    }
}

#[test]
fn a_stop_ends_a_download() {
    let (server, home) = (server(), tempfile::tempdir().unwrap());
    let hub = hub_with(&server.address, home.path(), &[]);
    let stopped = hub.fetch("org/tiny", COMMIT, &mut |_, _| Err(StageError::Stopped));
    assert!(matches!(stopped, Err(StageError::Stopped)));
}
