//! What a job tells of its server: waits, silence, and whose fault it is.

use super::*;

struct Asking<'a>(&'a Endpoint);

impl RowFunction for Asking<'_> {
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
        let one = |row: &usize| match self.0.post("x", body(*row), number) {
            Ok(n) => Ok((*row, Ok(n.to_le_bytes().to_vec()))),
            Err(error) => Ok((*row, Err(error.of_one()?))),
        };
        rows.iter().map(one).collect()
    }
}

#[test]
fn a_long_pause_is_told_while_it_lasts() {
    let (no_credit, under_way) = (json!({"error": {"message": "no credit left"}}), AtomicUsize::new(0));
    let server = Server::start(move |_| {
        under_way.fetch_add(1, Ordering::Relaxed);
        // One that is answered holds back those that are not sent yet.
        while under_way.load(Ordering::Relaxed) < 4 {
            std::thread::sleep(Duration::from_millis(5));
        }
        Reply::Status(429, "retry-after: 600", no_credit.clone())
    });
    let (stop, warnings): (StopFlag, Arc<Mutex<Vec<String>>>) = Default::default();
    let heard = Arc::clone(&warnings);
    let sink = move |event| {
        if let WorkerEvent::Log { level: LogLevel::Warn, message } = event {
            heard.lock().unwrap().push(message);
        }
    };
    let nothing = BTreeMap::new;
    let mut cx = StageContext::new(nothing(), nothing(), Default::default(), 1, vec![], stop.clone(), sink);
    let endpoint = Endpoint::new(&server.url(), settings(), cx.stop_flag());
    let keys = (0..4).map(|n| RowRecipe::new("asking", 1).row().text("n", &n.to_string()).key()).collect();
    let job = RowJob::new("asking", "item", keys).batch(1).requests(4);
    let all_wait = || endpoint.report().is_some_and(|report| report.contains("4 tried again (4 × status 429)"));
    let ended = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !all_wait() || warnings.lock().unwrap().is_empty() {
                std::thread::sleep(Duration::from_millis(5));
            }
            stop.stop();
        });
        rows::run(&mut cx, &job, |device: RowDevice| {
            endpoint.tell_by(&device.notes);
            Ok(Asking(&endpoint))
        })
    });
    assert!(matches!(ended, Err(StageError::Stopped)));
    assert_eq!(server.seen().len(), 4);
    let told = format!(
        "{}/x: status 429: no credit left; the server asks to wait 600 s: all requests wait until then",
        server.url()
    );
    assert_eq!(*warnings.lock().unwrap(), [told], "four requests wait, and one says so");
}

#[test]
fn that_no_request_is_answered_yet_is_told_while_it_is_tried_again() {
    let server = Server::start(|request| match request.number {
        0..5 => Reply::Status(500, "", json!({"error": {"message": "no model is loaded"}})),
        _ => Reply::Json(request.body.clone()),
    });
    let warnings: Arc<Mutex<Vec<String>>> = Arc::default();
    let heard = Arc::clone(&warnings);
    let sink = move |event| {
        if let WorkerEvent::Log { level: LogLevel::Warn, message } = event {
            heard.lock().unwrap().push(message);
        }
    };
    let nothing = BTreeMap::new;
    let mut cx = StageContext::new(nothing(), nothing(), Default::default(), 1, vec![], StopFlag::default(), sink);
    let endpoint = endpoint(&server.url(), Settings { concurrency: 1, retries: 5, ..settings() });
    let job = RowJob::new("asking", "item", vec![RowRecipe::new("asking", 1).row().text("n", "0").key()]);
    let rows = rows::run(&mut cx, &job, |device: RowDevice| {
        endpoint.tell_by(&device.notes);
        Ok(Asking(&endpoint))
    });
    assert_eq!(rows.unwrap().failures().count(), 0);
    let told = format!("{}: no request is answered yet (status 500: no model is loaded); trying again", server.url());
    assert_eq!(*warnings.lock().unwrap(), [told], "five tries failed, and one says so");
}

#[test]
fn what_a_server_does_to_all_requests_is_told_as_its_fault() {
    let outcome = |endpoint: &Endpoint| {
        let rows = StageError::FailedRows { message: "2 of 2 items failed".into(), help: None };
        let error = endpoint.explain(rows.help("set `max_failed_rows`"));
        assert_eq!((error.to_string().as_str(), error.failure()), ("2 of 2 items failed", Failure::FailedRows));
        error.help_text().unwrap().to_owned()
    };
    let replies: [(Reply, &str); 4] = [
        (Reply::Status(500, "", json!("CUDA error")), "see the server's log"),
        (Reply::Text("<html>Sign in</html>"), "something else answers there"),
        (Reply::Json(json!({"m": 1})), "its interface is not OpenAI's"),
        (Reply::Close, "see whether the server runs"),
    ];
    for (reply, wanted) in replies {
        let server = Server::start(move |_| reply.clone());
        let endpoint = endpoint(&server.url(), Settings { retries: 1, ..settings() });
        assert!(endpoint.post("x", body(0), number).is_err());
        let help = outcome(&endpoint);
        assert!(help.contains("may be its fault"), "of one request nobody knows: {help}");
        assert!(endpoint.post("x", body(1), number).is_err());
        let help = outcome(&endpoint);
        let fault = format!("{} had no answer of use to any request, which is its fault", server.url());
        assert!(help.starts_with(&fault) && help.contains(wanted), "{help}");
        let report = endpoint.report().unwrap();
        assert!(report.contains("2 failed") && report.ends_with("that is the server's fault and not the rows'"));
    }
    let nobody = endpoint_without_server();
    assert!((0..2).all(|n| nobody.post("x", body(n), number).is_err()));
    assert!(outcome(&nobody).contains("nobody listens there"));
    // One answer, and one refusal, show that others are possible.
    for reply in [Reply::Json(json!({"n": 0})), Reply::Status(400, "", json!("too long"))] {
        let server = Server::start(move |request| match request.body["n"].as_u64() {
            Some(0) => reply.clone(),
            _ => Reply::Status(500, "", json!("oh")),
        });
        let endpoint = endpoint(&server.url(), Settings { retries: 0, ..settings() });
        (0..3).for_each(|n| drop(endpoint.post("x", body(n), number)));
        assert_eq!(outcome(&endpoint), "set `max_failed_rows`");
        assert!(!endpoint.report().unwrap().contains("fault"));
    }
}

#[test]
fn stages_tell_a_server_s_fault() {
    let server = Server::start(|_| Reply::Status(500, "", json!({"error": {"message": "no model is loaded"}})));
    let items = "{\"id\":\"a\",\"title\":\"red soap bar\"}\n{\"id\":\"b\",\"title\":\"blue gel\"}\n";
    let model = json!({"endpoint": server.url(), "model": "m", "retries": 0});
    for (kind, with) in [("similarity", json!({"encoder": model})), ("tid", json!({"extractor": model}))] {
        let error = testing::run(kind, with, &[("items", items)]).unwrap_err();
        assert!(error.to_string().contains("status 500: no model is loaded"), "{error}");
        let help = error.help_text().unwrap();
        assert!(help.starts_with(&server.url()) && help.contains("its fault and not the rows'"), "{kind}: {help}");
    }
}

#[test]
fn a_rerun_for_the_rows_that_have_no_answer_does_not_blame_the_server() {
    let server = Server::start(|request| match request.body["n"].as_u64() {
        Some(2 | 5) => Reply::Status(500, "", json!("oh")),
        _ => Reply::Json(request.body.clone()),
    });
    let (memo, logs): (MemoryMemo, Arc<Mutex<Vec<String>>>) = Default::default();
    let run = |may_fail| {
        let heard = Arc::clone(&logs);
        let sink = move |event| {
            if let WorkerEvent::Log { message, .. } = event {
                heard.lock().unwrap().push(message);
            }
        };
        let (nothing, stop) = (BTreeMap::new, StopFlag::default());
        let cx = StageContext::new(nothing(), nothing(), Default::default(), 1, vec![], stop, sink);
        let mut cx = cx.with_rows(memo.clone());
        let endpoint = endpoint(&server.url(), Settings { retries: 0, ..settings() });
        let keys = (0..8).map(|n| RowRecipe::new("asking", 1).row().text("n", &n.to_string()).key()).collect();
        let job = RowJob::new("asking", "item", keys).batch(1).requests(2).max_failed_rows(may_fail);
        let outcome = rows::run(&mut cx, &job, |_: RowDevice| Ok(Asking(&endpoint)));
        endpoint.conclude(&mut cx, &job, outcome).map_err(|error| error.help_text().unwrap().to_owned())
    };
    for _ in 0..2 {
        let help = run(0).unwrap_err();
        assert!(help.contains("set `max_failed_rows`"), "{help}");
    }
    assert_eq!(run(2).unwrap().failures().count(), 2);
    assert_eq!(server.seen().len(), 8 + 2 + 2, "a rerun asks for the rest");
    let told = std::mem::take(&mut *logs.lock().unwrap());
    assert!(told.iter().any(|line| line.contains("0 requests answered, 2 failed")), "{told:?}");
    assert!(!told.iter().any(|line| line.contains("fault")), "{told:?}");
}
