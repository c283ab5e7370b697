//! The client against a server that fails in every way.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};

use super::{
    CallError, Endpoint, Request, Settings,
    server::{Reply, Server},
};
use crate::{
    Failure, StageContext, StageError, StopFlag, WorkerEvent,
    event::LogLevel,
    rows::{self, MemoryMemo, RowDevice, RowFunction, RowJob, RowRecipe, RowResult},
    testing,
};

mod told;

fn settings() -> Settings {
    Settings { timeout: 60.0, retries: 3, concurrency: 4, ..Settings::default() }
}

fn endpoint(url: &str, settings: Settings) -> Endpoint {
    Endpoint::new(url, settings, StopFlag::default()).with_delays(Duration::from_millis(5), Duration::from_millis(20))
}

/// `one` for each number below `count`, on as many threads as requests may be under way at once.
fn each<T: Send>(endpoint: &Endpoint, count: usize, one: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let (threads, one) = (endpoint.settings.concurrency, &one);
    let mut all: Vec<(usize, T)> = std::thread::scope(|scope| {
        let run = |first| move || (first..count).step_by(threads).map(|n| (n, one(n))).collect::<Vec<_>>();
        let started: Vec<_> = (0..threads).map(|first| scope.spawn(run(first))).collect();
        started.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    all.sort_by_key(|(n, _)| *n);
    all.into_iter().map(|(_, answer)| answer).collect()
}

fn body(number: usize) -> Map<String, Value> {
    Map::from_iter([("n".to_owned(), json!(number))])
}

/// Takes `{"n": …}`.
fn number(value: &Value) -> Result<u64, String> {
    value["n"].as_u64().ok_or_else(|| "no number".to_owned())
}

/// The first answer to every request is `first`, further ones are right.
fn failing_first(first: impl Fn(&Value) -> Reply + Send + Sync + 'static) -> Server {
    let asked: Mutex<Vec<Value>> = Mutex::default();
    Server::start(move |request| {
        let mut asked = asked.lock().unwrap();
        if asked.contains(&request.body) {
            Reply::Json(request.body.clone())
        } else {
            asked.push(request.body.clone());
            first(&request.body)
        }
    })
}

#[test]
fn every_failure_that_may_pass_is_tried_again() {
    let replies: [(&str, Reply); 8] = [
        ("status 429", Reply::Status(429, "retry-after: 0.05", json!({"error": {"message": "too many"}}))),
        ("status 500", Reply::Status(500, "", json!("oh"))),
        ("status 503", Reply::Status(503, "retry-after: Sun, 06 Nov 1994 08:49:37 GMT", json!({}))),
        ("no answer in time", Reply::Hang),
        ("half an answer or none", Reply::Half(json!({"n": 7, "text": "long enough to be cut"}))),
        ("half an answer or none", Reply::Close),
        ("not JSON", Reply::Text("{\"n\": ")),
        ("another answer than was asked for", Reply::Json(json!({"m": 1}))),
    ];
    for (reason, reply) in replies {
        // Only who waits for nothing has to wait for its end.
        let timeout = if matches!(reply, Reply::Hang) { 2.0 } else { 60.0 };
        let server = failing_first(move |_| reply.clone());
        let endpoint = endpoint(&server.url(), Settings { timeout, ..settings() });
        let answers = each(&endpoint, 3, |n| endpoint.post("x", body(n), number).unwrap());
        assert_eq!(answers, [0, 1, 2], "{reason}");
        let report = endpoint.report().unwrap();
        assert!(report.contains(&format!("3 requests answered; 3 tried again (3 × {reason})")), "{report}");
        assert_eq!(server.seen().len(), 6, "{reason}");
    }
}

#[test]
fn slow_answers_that_come_in_time_are_taken() {
    let server = Server::start(|request| Reply::Slow(Duration::from_millis(60), request.body.clone()));
    let endpoint = endpoint(&server.url(), settings());
    let start = Instant::now();
    let answers = each(&endpoint, 8, |n| endpoint.post("x", body(n), number).unwrap());
    assert_eq!(answers, [0, 1, 2, 3, 4, 5, 6, 7]);
    assert!(start.elapsed() >= Duration::from_millis(120), "4 at once");
    assert_eq!(endpoint.report(), None);
}

#[test]
fn a_server_that_asks_for_a_pause_gets_it_from_all() {
    let server = Server::start(|request| match request.number {
        0 => Reply::Status(429, "retry-after: 0.3", json!({})),
        _ => Reply::Json(request.body.clone()),
    });
    let endpoint = endpoint(&server.url(), Settings { concurrency: 1, ..settings() });
    let start = Instant::now();
    assert_eq!(each(&endpoint, 2, |n| endpoint.post("x", body(n), number).unwrap()), [0, 1]);
    assert!(start.elapsed() >= Duration::from_millis(300));
}

#[test]
fn one_refused_request_leaves_the_others() {
    let server = Server::start(|request| match request.body["n"].as_u64() {
        Some(1) => Reply::Status(400, "", json!({"error": {"message": "the prompt is too long"}})),
        _ => Reply::Json(request.body.clone()),
    });
    let endpoint = endpoint(&server.url(), settings());
    let answers = each(&endpoint, 3, |n| endpoint.post("x", body(n), number));
    assert!(answers[0].is_ok() && answers[2].is_ok());
    let Err(CallError::Refused(failure)) = &answers[1] else { panic!("{answers:?}") };
    assert!(failure.message.ends_with("status 400: the prompt is too long"), "{failure}");
    assert_eq!(server.seen().len(), 3, "a refused request is not tried again");
}

#[test]
fn a_wrong_key_or_address_ends_all_and_the_key_is_in_no_message() {
    let key = "sk-secret-1234567";
    // SAFETY of the test process: nextest gives each test its own; the name is used nowhere else.
    unsafe { std::env::set_var("GRLM_TEST_ENDPOINT_KEY", key) };
    let server = Server::start(move |_| {
        Reply::Status(401, "", json!({"error": {"message": "Incorrect API key provided: sk-secret-1234567."}}))
    });
    let with_key = Settings { api_key_env: Some("GRLM_TEST_ENDPOINT_KEY".into()), ..settings() };
    let endpoint = endpoint(&server.url(), with_key);
    let Err(CallError::All(error)) = endpoint.post("x", body(0), number) else { panic!() };
    assert!(error.to_string().ends_with("status 401: Incorrect API key provided: ***."), "{error}");
    assert_eq!(error.failure(), Failure::WrongInput, "trying again cannot help");
    assert_eq!(server.seen().len(), 1);
    assert!(!format!("{error:?} {endpoint:?} {:?}", endpoint.report()).contains(key));
    assert_eq!(server.seen()[0].authorization.as_deref(), Some("Bearer sk-secret-1234567"));
    let missing = Settings { api_key_env: Some("GRLM_TEST_NO_SUCH_KEY".into()), ..settings() };
    let endpoint = Endpoint::new("http://127.0.0.1:1/v1", missing, StopFlag::default());
    let Err(CallError::All(error)) = endpoint.post("x", body(0), number) else { panic!() };
    assert!(error.to_string().contains("`GRLM_TEST_NO_SUCH_KEY` is not set"));
    assert!(error.help_text().unwrap().contains("secrets: [GRLM_TEST_NO_SUCH_KEY]"));
}

#[test]
fn no_part_of_the_key_is_shown_where_a_message_is_cut() {
    let key = "sk-0123456789abcdefghijklmnopqrstu";
    // SAFETY of the test process: nextest gives each test its own; the name is used nowhere else.
    unsafe { std::env::set_var("GRLM_TEST_ENDPOINT_LONG_KEY", key) };
    let settings = Settings { api_key_env: Some("GRLM_TEST_ENDPOINT_LONG_KEY".into()), retries: 0, ..settings() };
    for before in [275, 290] {
        let text = format!("{}{key}", "x".repeat(before));
        for (status, reply) in
            [(401, json!({"error": {"message": &text}})), (500, json!(text)), (200, json!({"m": text}))]
        {
            let server = Server::start(move |_| Reply::Status(status, "", reply.clone()));
            let error = endpoint(&server.url(), settings.clone()).post("x", body(0), number).unwrap_err();
            assert!(!format!("{error:?}").contains("sk-"), "{error:?}");
        }
    }
}

#[test]
fn a_server_that_is_down_ends_all_after_a_few_requests() {
    let server = Server::start(|_| Reply::Close);
    let endpoint = endpoint(&server.url(), Settings { retries: 1, ..settings() });
    let answers = each(&endpoint, 100, |n| endpoint.post("x", body(n), number));
    let ended = answers.iter().filter(|a| matches!(a, Err(CallError::All(StageError::Network { .. })))).count();
    assert!(ended >= 90, "{ended}");
    assert!(server.seen().len() <= 20, "{}", server.seen().len());
    let failure = answers.iter().find_map(|answer| match answer {
        Err(CallError::NoAnswer { failure, answered: false }) => Some(failure),
        _ => None,
    });
    let failure = failure.unwrap();
    assert!(failure.message.starts_with("no answer of use; the last: http://"), "{failure}");
    let Err(CallError::All(error)) = &answers[99] else { panic!() };
    assert!(error.to_string().contains("requests in a row had no answer"), "{error}");
}

#[test]
fn requests_over_which_a_server_stumbles_are_no_sign_that_it_is_down() {
    for status in [500, 501] {
        let server = Server::start(move |request| match request.body["n"].as_u64() {
            Some(8..) => Reply::Json(request.body.clone()),
            _ => Reply::Status(status, "", json!({"error": {"message": "input is too large"}})),
        });
        let endpoint = endpoint(&server.url(), Settings { concurrency: 1, retries: 1, ..settings() });
        let answers = each(&endpoint, 16, |n| endpoint.post("x", body(n), number));
        assert!(answers[..8].iter().all(|a| matches!(a, Err(CallError::NoAnswer { answered: true, .. }))));
        assert!(answers[8..].iter().all(Result::is_ok));
    }
}

#[test]
fn an_answer_between_failures_shows_that_a_server_runs() {
    let server = Server::start(|request| match request.body["n"].as_u64() {
        Some(n) if n % 3 == 2 => Reply::Status(400, "", json!("too long")),
        _ => Reply::Close,
    });
    let endpoint = endpoint(&server.url(), Settings { concurrency: 1, retries: 0, ..settings() });
    let answers = each(&endpoint, 12, |n| endpoint.post("x", body(n), number));
    assert!(answers.iter().all(|answer| !matches!(answer, Err(CallError::All(_)))), "{answers:?}");
}

#[test]
fn a_server_that_is_down_is_told_with_its_last_words_and_what_may_help() {
    let one = Settings { concurrency: 1, retries: 0, ..settings() };
    let end = |url: &str| {
        let endpoint = endpoint(url, one.clone());
        let last = each(&endpoint, 4, |n| endpoint.post("x", body(n), number)).pop();
        let Some(Err(CallError::All(error))) = last else { panic!("{last:?}") };
        (error.to_string(), error.help_text().unwrap().to_owned())
    };
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (message, help) = end(&format!("http://{free}/v1"));
    assert!(message.contains("3 requests in a row had no answer; the last: http://"), "{message}");
    assert!(message.contains("no connection: Connection refused") && help.starts_with("nobody listens"), "{help}");
    for (status, said, helps) in
        [(429, "no credit left", "a limit or quota"), (503, "no healthy upstream", "see whether the server runs")]
    {
        let server = Server::start(move |_| Reply::Status(status, "", json!({"error": {"message": said}})));
        let (message, help) = end(&server.url());
        assert!(message.ends_with(&format!("status {status}: {said}")) && help.starts_with(helps), "{message}: {help}");
    }
    let server = Server::start(|_| Reply::Status(404, "", json!("not found")));
    let refused = endpoint(&server.url(), one.clone()).post("x", body(0), number);
    let Err(CallError::All(error)) = refused else { panic!() };
    assert!(error.help_text().unwrap().starts_with("this is not the interface"), "{error:?}");
}

#[test]
fn what_ends_all_ends_the_waits_too() {
    let under_way = AtomicBool::new(false);
    let server = Server::start(move |request| {
        if request.body["n"] == 1 {
            under_way.store(true, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(200));
            return Reply::Status(401, "", json!("who are you"));
        }
        while !under_way.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        Reply::Status(429, "retry-after: 600", json!({}))
    });
    let endpoint = endpoint(&server.url(), Settings { concurrency: 2, ..settings() });
    let start = Instant::now();
    for answer in each(&endpoint, 2, |n| endpoint.post("x", body(n), number)) {
        let Err(CallError::All(error)) = answer else { panic!("{answer:?}") };
        assert!(error.to_string().ends_with("status 401: \"who are you\""), "{error}");
        assert_eq!(error.failure(), Failure::WrongInput);
    }
    assert!(start.elapsed() < Duration::from_secs(300));
    // So does what the caller has to say.
    let endpoint = Endpoint::new(&server.url(), settings(), StopFlag::default());
    endpoint.end(StageError::FailedRows { message: "enough".into(), help: None });
    let Err(CallError::All(error)) = endpoint.post("x", body(0), number) else { panic!() };
    assert_eq!((error.to_string().as_str(), error.failure()), ("enough", Failure::FailedRows));
}

#[test]
fn nobody_there_is_told_from_half_an_answer() {
    let nobody = endpoint_without_server();
    let Err(CallError::NoAnswer { failure, answered: false }) = nobody.post("x", body(0), number) else { panic!() };
    assert!(failure.message.contains("no connection: Connection refused"), "{failure}");
    let report = nobody.report().unwrap();
    assert!(report.contains("1 failed; 3 tried again (3 × no connection)"), "{report}");
    // The longest wait for a connection, and not that for the answer.
    let slow = endpoint("http://x/v1", Settings { timeout: 90.0, ..settings() });
    let lookup = "failed to lookup address information: Name or service not known";
    for (error, wanted) in [
        (ureq::Error::Timeout(ureq::Timeout::Connect), "u: no connection within 20 s".to_owned()),
        (ureq::Error::Io(std::io::Error::other(lookup)), format!("u: no connection: {lookup}")),
    ] {
        let super::Miss::Again { message, reason, answered: false, .. } = slow.lost("u", error) else { panic!() };
        assert_eq!((reason.as_str(), message), ("no connection", wanted));
    }
}

#[test]
fn plain_http_behind_https_is_a_mistake_that_says_so() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            counted.fetch_add(1, Ordering::Relaxed);
            let _ = std::io::Write::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n");
            // Closed before all is read, it would take the answer back.
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }
    });
    let https = endpoint(&format!("https://{address}/v1"), settings());
    let Err(CallError::All(error)) = https.post("x", body(0), number) else { panic!() };
    assert!(error.to_string().contains(&format!("https://{address}/v1/x: no TLS connection: ")), "{error}");
    assert!(error.help_text().unwrap().contains("begin the address with `http://`"), "{error:?}");
    assert_eq!((error.failure(), calls.load(Ordering::Relaxed)), (Failure::WrongInput, 1), "it is not tried again");
    // Where there was an answer, it is the server's trouble.
    let server = Server::start(|request| Reply::Json(request.body.clone()));
    let answered = endpoint(&server.url(), settings());
    answered.post("x", body(0), number).unwrap();
    let broken = std::io::Error::new(std::io::ErrorKind::InvalidData, "alert");
    assert!(matches!(answered.lost("u", ureq::Error::Io(broken)), super::Miss::Again { answered: false, .. }));
}

fn endpoint_without_server() -> Endpoint {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    endpoint(&format!("http://{free}/v1"), settings())
}

#[test]
fn a_stop_ends_the_waits() {
    let server = Server::start(|_| Reply::Status(429, "retry-after: 600", json!({})));
    let stop = StopFlag::default();
    let endpoint = Endpoint::new(&server.url(), settings(), stop.clone());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(100));
            stop.stop();
        });
        let answer = endpoint.post("x", body(0), number);
        assert!(matches!(answer, Err(CallError::All(StageError::Stopped))), "{answer:?}");
    });
}

/// Whether the answer never comes, or its end does not.
#[test]
fn a_stop_cuts_off_what_is_under_way() {
    for (retries, reply) in [(0, Reply::Hang), (3, Reply::Hang), (0, Reply::HalfAndHang(json!({"n": 12345})))] {
        let stop = StopFlag::default();
        let asked = stop.clone();
        let server = Server::start(move |_| {
            asked.stop();
            reply.clone()
        });
        // Nobody waits for that: a stop that does not come through is told by the test's own limit.
        let endless = Settings { timeout: 86_400.0, retries, ..settings() };
        let endpoint = Endpoint::new(&server.url(), endless, stop);
        let answer = endpoint.post("x", body(0), number);
        assert!(matches!(answer, Err(CallError::All(StageError::Stopped))), "{answer:?}");
    }
}

#[test]
fn a_redirect_is_a_mistake_that_says_where_to() {
    for status in [301, 307] {
        let server = Server::start(move |_| {
            Reply::Status(status, "location: https://llm.example.com/v1/x?token=abc", json!("moved"))
        });
        let endpoint = endpoint(&server.url(), settings());
        let Err(CallError::All(error)) = endpoint.post("x", body(0), number) else { panic!() };
        let said = format!("status {status}: it redirects to https://llm.example.com/v1/x");
        assert!(error.to_string().ends_with(&said), "{error}");
        assert_eq!(error.failure(), Failure::WrongInput, "neither request nor stage is tried again");
        assert_eq!(server.seen().len(), 1);
    }
}

#[test]
fn fields_that_the_stage_decides_are_refused() {
    let check_of = |request, field: &str, value: Value| {
        let extra_body = Map::from_iter([(field.to_owned(), value)]);
        Settings { extra_body, ..settings() }.check(request, "encoder", Some("http://h/v1"))
    };
    let check = |field: &str, value| check_of(Request::Embeddings, field, value);
    let refused = [
        ("model", json!("other")),
        ("messages", json!([])),
        ("messages", Value::Null),
        ("input", json!("x")),
        ("stream", json!(true)),
        ("n", json!(2)),
        ("encoding_format", json!("base64")),
    ];
    for (field, value) in refused {
        let issues = check(field, value);
        let [issue] = issues.as_slice() else { panic!("{field}: {issues:?}") };
        assert_eq!(issue.path, format!("encoder.extra_body.{field}"));
        assert!(issue.message.contains(&format!("`{field}` of `extra_body`")) && issue.help.is_some(), "{issue:?}");
    }
    assert!(check("model", json!("x"))[0].help.as_ref().unwrap().contains("`encoder.model`"));
    // Each stage speaks of what it has.
    for (request, field, why, help) in [
        (Request::Chat, "messages", "the stage's own", "they are made of each item and of the text `tid_extraction`"),
        (Request::Chat, "input", "not of this request", "leave it out: what is asked is sent as `messages`"),
        (Request::Embeddings, "messages", "not of this request", "leave it out: the items' texts are sent as `input`"),
        (Request::Embeddings, "input", "the stage's own", "it is the items' texts; `prefix` is what each"),
    ] {
        let issues = check_of(request, field, json!("x"));
        let [issue] = issues.as_slice() else { panic!("{field}: {issues:?}") };
        assert!(issue.message.ends_with(why) && issue.help.as_ref().unwrap().starts_with(help), "{issue:?}");
    }
    let taken = [
        ("model", Value::Null),
        ("stream", json!(false)),
        ("n", json!(1)),
        ("encoding_format", Value::Null),
        ("temperature", json!(1)),
        ("max_tokens", Value::Null),
    ];
    for (field, value) in taken {
        assert!(check(field, value).is_empty(), "{field}");
    }
}

#[test]
fn further_fields_are_added_and_taken_away() {
    let server = Server::start(|request| Reply::Json(json!({"n": 1, "request": request.path})));
    let extra_body = Map::from_iter([("n".to_owned(), Value::Null), ("seed".to_owned(), json!(5))]);
    let endpoint = endpoint(&format!("{}/", server.url()), Settings { extra_body, ..settings() });
    endpoint.post("chat/completions", body(0), number).unwrap();
    let seen = &server.seen()[0];
    assert_eq!((seen.path.as_str(), &seen.body), ("/v1/chat/completions", &json!({"seed": 5})));
}

#[test]
fn addresses_and_settings_are_checked() {
    let issues = |address: &str| {
        settings().check(Request::Chat, "extractor", Some(address)).into_iter().map(|i| i.path).collect::<Vec<_>>()
    };
    assert!(issues("http://localhost:8000/v1").is_empty() && issues("https://host").is_empty());
    for wrong in ["localhost:8000", "ftp://x", "http://", "https://user:pass@host/v1", "https://h/v1?api_key=sk-1"] {
        assert_eq!(issues(wrong), ["extractor.endpoint"], "{wrong}");
    }
    let wrong = Settings { concurrency: 0, timeout: 0.0, retries: 1000, api_key_env: Some("a b".into()), ..settings() };
    assert_eq!(wrong.check(Request::Chat, "e", Some("http://x/v1")).len(), 4);
    let key = Settings { api_key_env: Some("sk-1234567890abcdef".into()), ..settings() }.check(
        Request::Chat,
        "e",
        Some("http://x/v1"),
    );
    assert!(key.len() == 1 && !format!("{key:?}").contains("sk-"), "{key:?}");
    assert!(
        super::secret("e", Some("sk-1234567890abcdef")).is_empty() && super::secret("e", Some("LLM_KEY")).len() == 1
    );
    let meaningless = Settings { api_key_env: Some("KEY".into()), ..settings() }.check(Request::Chat, "e", None);
    let paths: Vec<&str> = meaningless.iter().map(|issue| issue.path.as_str()).collect();
    assert_eq!(paths, ["e.api_key_env", "e.concurrency", "e.timeout", "e.retries"]);
    assert!(Settings::default().check(Request::Chat, "e", None).is_empty());
    let bare = Endpoint::new("http://localhost:8000", settings(), StopFlag::default());
    assert_eq!(format!("{bare:?}"), "Endpoint(http://localhost:8000/v1)");
}
