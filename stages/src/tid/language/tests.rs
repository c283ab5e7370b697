//! `tid` by a language model behind a server that fails in every way. A model of our own is asked in [`local`].

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    Failure,
    endpoint::server::{Reply, Request, Server, completion},
    rows::MemoryMemo,
    testing::{Bench, Ran, refuses},
};

mod collisions;
mod local;

const SPACE: &str = "tid-answer";
/// What a model is told by that had no answer of use.
const IN_VAIN: &str = "five words for none";

/// Titles that say their number, so that a server can make words of it.
fn items(count: usize) -> String {
    (0..count)
        .map(|i| format!("{}\n", json!({"id": i.to_string(), "title": format!("Soap no. {i} of ours")})))
        .collect()
}

/// The number of the item that a request is about: that of its first prompt.
fn number(request: &Request) -> usize {
    let prompt = request.body["messages"][0]["content"].as_str().unwrap();
    let (_, after) = prompt.split_once("Title: Soap no. ").unwrap();
    after.split(' ').next().unwrap().parse().unwrap()
}

fn words(number: usize) -> String {
    format!("[soap, bar, mild, olive, no-{number}]")
}

fn with(url: &str) -> Value {
    json!({"extractor": {"endpoint": url, "model": "m", "timeout": 60.0, "retries": 3, "concurrency": 4}})
}

fn run(bench: &Bench, with: Value) -> Ran {
    bench.run("tid", with).unwrap()
}

fn tid(ran: &Ran, line: usize) -> String {
    ran.lines("tids")[line]["summary_words"]
        .as_array()
        .unwrap()
        .iter()
        .map(|w| w.as_str().unwrap())
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn every_item_has_its_words_whatever_the_server_does() {
    let asked: Mutex<HashMap<usize, usize>> = Mutex::default();
    let server = Server::start(move |request| {
        let number = number(request);
        let mut asked = asked.lock().unwrap();
        let times = asked.entry(number).or_default();
        *times += 1;
        let right = completion(&words(number));
        match (number % 8, *times) {
            (0, 1) => Reply::Status(429, "retry-after: 0.1", json!({"error": {"message": "slow down"}})),
            (1, 1) => Reply::Status(500, "", json!({"error": "oh"})),
            (2, 1) => Reply::Close,
            (3, 1) => Reply::Half(right),
            (4, 1) => Reply::Text("<html>Bad gateway</html>"),
            (5, 1) => Reply::Json(json!({"choices": []})),
            (6, 1) => Reply::Slow(Duration::from_millis(100), right),
            _ => Reply::Json(right),
        }
    });
    let memo = MemoryMemo::default();
    let bench = Bench::new().input("items", items(24)).memo(&memo);
    let ran = run(&bench, with(&server.url()));
    for line in 0..24 {
        assert_eq!(tid(&ran, line), format!("soap bar mild olive no-{line}"));
    }
    assert!(ran.text("invalid").is_empty());
    // Six of eight kinds of items were asked for twice, and none once it had an answer.
    assert_eq!(server.seen().len(), 24 + 6 * 3);
    assert_eq!(memo.appended(), 24);
    let report = ran.logs().into_iter().find(|line| line.contains("tried again")).unwrap().to_owned();
    for words in [
        "24 requests answered; 18 tried again",
        "3 × status 429",
        "3 × status 500",
        "6 × half an answer or none",
        "3 × not JSON",
        "3 × another answer than was asked for",
    ] {
        assert!(report.contains(words), "{words}: {report}");
    }
    let statistics = ran.json("statistics");
    assert_eq!(statistics["summary"]["distinct_words"], 28);
    assert_eq!(
        statistics["extraction"],
        json!({"answers": 24, "asked_again": 0, "prompt_tokens": 24 * 7, "answer_tokens": 24 * 5})
    );
    // Everything is known now, and the server is not needed.
    drop(server);
    let again = run(&bench, with("http://127.0.0.1:9/v1"));
    assert_eq!(again.text("tids"), ran.text("tids"));
    assert_eq!(again.text("statistics"), ran.text("statistics"));
    // Told, and not counted as spent again.
    let spent = |ran: &Ran| (ran.metric("prompt_tokens"), ran.metric("answer_tokens"));
    assert_eq!(spent(&ran), (Some(24.0 * 7.0), Some(24.0 * 5.0)));
    assert_eq!(spent(&again), (Some(0.0), Some(0.0)));
    for words in ["24 of 24 items are known", "24 answers of `m` were asked for earlier", "0 questions asked in"] {
        assert!(again.logs().iter().any(|line| line.contains(words)), "{words}: {:?}", again.logs());
    }
}

#[test]
fn requests_are_as_the_interface_wants_them() {
    let server = Server::start(|request| Reply::Json(completion(&words(number(request)))));
    let mut with = with(&server.url());
    with["extractor"]["extra_body"] = json!({"seed": 1, "temperature": null});
    run(&Bench::new().input("items", items(1)), with.clone());
    let seen = &server.seen()[0];
    assert_eq!(seen.path, "/v1/chat/completions");
    assert_eq!(seen.authorization, None);
    let mut body = seen.body.clone();
    assert!(body["messages"][0]["content"].as_str().unwrap().contains("Title: Soap no. 0 of ours"));
    body["messages"] = json!(body["messages"].as_array().unwrap().len());
    let settings = json!({"enable_thinking": false});
    let expected = json!({
        "model": "m", "messages": 1, "max_tokens": 50, "stop": ["]"], "seed": 1, "chat_template_kwargs": settings,
    });
    assert_eq!(body, expected);
    with["compat"] = json!("reference");
    run(&Bench::new().input("items", items(1)), with);
    let body = &server.seen()[1].body;
    assert!(body.get("stop").is_none() && body.get("chat_template_kwargs").is_none());
}

#[test]
fn an_unusable_answer_is_asked_again_and_never_padded() {
    let server = Server::start(|request| {
        let turns = request.body["messages"].as_array().unwrap().len();
        Reply::Json(completion(match (number(request), turns) {
            (0, 1) => "[soap, bar",
            (0, 3) => "soap, bar, mild, olive, green",
            (0, _) => unreachable!(),
            _ => "I cannot say.",
        }))
    });
    let bench = Bench::new().input("items", items(2));
    let ran = run(&bench, with(&server.url()));
    assert_eq!(tid(&ran, 0), "soap bar mild olive green");
    assert_eq!(ran.lines("tids")[1]["summary_words"], json!([]));
    let invalid = ran.lines("invalid");
    assert_eq!((invalid.len(), &invalid[0]["id"], &invalid[0]["answer"]), (1, &json!("1"), &json!("I cannot say.")));
    assert_eq!(invalid[0]["reason"], "1 of 5 words in the answer, asked 3 times");
    assert_eq!(server.seen().len(), 2 + 3);
    assert_eq!(ran.json("statistics")["extraction"]["asked_again"], 1 + 2);
    assert_eq!(ran.json("statistics")["summary"]["valid_share"], 0.5);

    let mut reference = with(&server.url());
    reference["compat"] = json!("reference");
    let ran = run(&bench, reference);
    assert_eq!(ran.lines("tids")[0]["summary_words"], json!(["soap", "bar", "", "", ""]));
    assert_eq!(ran.lines("tids")[0]["llm_output"], "[soap, bar");
    assert!(ran.json("statistics").get("summary").is_none());
}

#[test]
fn a_refused_item_fails_alone_and_a_rerun_asks_for_it_alone() {
    let mended = Arc::new(AtomicBool::new(false));
    let now = Arc::clone(&mended);
    let server = Server::start(move |request| match number(request) {
        2 if !now.load(Ordering::SeqCst) => Reply::Status(400, "", json!({"error": {"message": "too long"}})),
        number => Reply::Json(completion(&words(number))),
    });
    let memo = MemoryMemo::default();
    let bench = Bench::new().input("items", items(6)).memo(&memo);
    let error = bench.run("tid", with(&server.url())).unwrap_err();
    assert_eq!(error.failure(), Failure::FailedRows);
    assert!(error.to_string().starts_with("1 of 6 items failed; item `2`: http://"), "{error}");
    assert!(error.to_string().ends_with("status 400: too long"), "{error}");
    assert_eq!(memo.len(SPACE), 5);
    let before = server.seen().len();
    mended.store(true, Ordering::SeqCst);
    let ran = run(&bench, with(&server.url()));
    assert_eq!(tid(&ran, 2), "soap bar mild olive no-2");
    assert_eq!(server.seen().len(), before + 1);

    let server = Server::start(|request| match number(request) {
        2 => Reply::Status(400, "", json!({"error": {"message": "too long"}})),
        number => Reply::Json(completion(&words(number))),
    });
    let mut lenient = with(&server.url());
    lenient["max_failed_rows"] = json!(1);
    let ran = run(&Bench::new().input("items", items(6)), lenient);
    assert!(ran.lines("invalid")[0]["reason"].as_str().unwrap().ends_with("too long"));
}

#[test]
fn a_repeated_question_that_cannot_be_asked_leaves_the_first_answer() {
    let failing = |status: u16| {
        Server::start(move |request| match turns(request) {
            1 => Reply::Json(completion("[soap, bar")),
            _ => Reply::Status(status, "", json!({"error": {"message": "context too long"}})),
        })
    };
    let server = failing(400);
    let ran = run(&Bench::new().input("items", items(2)), with(&server.url()));
    let invalid = ran.lines("invalid");
    assert_eq!((invalid.len(), &invalid[0]["answer"]), (2, &json!("[soap, bar")));
    assert_eq!(invalid[0]["reason"], "2 of 5 words in the answer, asked once");
    let spent = json!({"answers": 2, "asked_again": 0, "prompt_tokens": 14, "answer_tokens": 10});
    assert_eq!(ran.json("statistics")["extraction"], spent);
    assert!(ran.logs().iter().any(|line| line.contains("2 of 2 questions failed; questions `0`, `1`: ")));
    // What ends all questions ends the stage.
    let error = Bench::new().input("items", items(2)).run("tid", with(&failing(401).url())).unwrap_err();
    assert!(error.to_string().contains("status 401"), "{error}");
}

#[test]
fn equal_prompts_are_one_question_and_no_known_answer() {
    let server = Server::start(|request| Reply::Json(completion(&words(number(request)))));
    let twice = items(1) + &json!({"id": "again", "title": "Soap no. 0 of ours"}).to_string();
    let mut with = with(&server.url());
    with["resolve_collisions"] = json!(false);
    let memo = MemoryMemo::default();
    let bench = Bench::new().input("items", twice).memo(&memo);
    for (asked, known) in [(1, 0), (0, 1)] {
        let ran = run(&bench, with.clone());
        let told = |line: &&str| {
            line.starts_with(&format!("{asked} questions asked"))
                && line.ends_with(&format!("; {known} answers were known"))
        };
        assert!(ran.logs().into_iter().any(|line| told(&line)), "{:?}", ran.logs());
    }
}

fn turns(request: &Request) -> usize {
    request.body["messages"].as_array().unwrap().len()
}

#[test]
fn more_attempts_go_on_from_the_answers_there_are() {
    let server = Server::start(|request| match turns(request) {
        5 => Reply::Json(completion(&words(number(request)))),
        _ => Reply::Json(completion("[soap]")),
    });
    let memo = MemoryMemo::default();
    let bench = Bench::new().input("items", items(2)).memo(&memo);
    let mut with = with(&server.url());
    with["extractor"]["max_attempts"] = json!(2);
    assert_eq!(run(&bench, with.clone()).lines("invalid").len(), 2);
    assert_eq!(server.seen().len(), 4);
    with["extractor"]["max_attempts"] = json!(3);
    let ran = run(&bench, with.clone());
    assert_eq!((tid(&ran, 1), server.seen().len()), ("soap bar mild olive no-1".to_owned(), 6));
    assert_eq!(
        (ran.metric("prompt_tokens"), &ran.json("statistics")["extraction"]["prompt_tokens"]),
        (Some(14.0), &json!(42))
    );
    // Fewer are as if there had never been more.
    with["extractor"]["max_attempts"] = json!(1);
    assert_eq!(run(&bench, with).lines("invalid")[0]["reason"], "1 of 5 words in the answer, asked once");
    assert_eq!(server.seen().len(), 6);
}

#[test]
fn a_cut_answer_is_asked_again() {
    let server = Server::start(|request| {
        let mut cut = completion("[steel, hexagonal, bolt, fastener, zinc-pl");
        cut["choices"][0]["finish_reason"] = json!("length");
        Reply::Json(if turns(request) == 1 { cut } else { completion("[steel, hexagonal, bolt, fastener, zinc") })
    });
    let ran = run(&Bench::new().input("items", items(1)), with(&server.url()));
    assert_eq!(tid(&ran, 0), "steel hexagonal bolt fastener zinc");
    let seen = server.seen();
    let asked = seen[1].body["messages"][2]["content"].as_str().unwrap();
    assert!(
        asked.starts_with("That answer was too long and was cut off: what there is of it holds 4 words"),
        "{asked}"
    );
}

#[test]
fn an_answer_that_is_always_cut_is_told_as_that() {
    let server = Server::start(|_| {
        let mut cut = completion("[steel, bolt");
        cut["choices"][0]["finish_reason"] = json!("length");
        Reply::Json(cut)
    });
    let mut with = with(&server.url());
    let bench = Bench::new().input("items", items(1));
    let reason = |with: &Value| run(&bench, with.clone()).lines("invalid")[0]["reason"].clone();
    assert_eq!(reason(&with), "1 of 5 words in the answer, which `max_new_tokens` cut off, asked 3 times");
    with["compat"] = json!("reference");
    assert_eq!(reason(&with), "blank words in the answer, which `max_new_tokens` cut off");
}

#[test]
fn a_model_without_five_words_for_any_item_is_told_as_that() {
    let server = Server::start(|_| Reply::Json(completion("I cannot\nsay.")));
    let memo = MemoryMemo::default();
    let bench = Bench::new().input("items", items(3)).memo(&memo);
    let ran = run(&bench, with(&server.url()));
    let said = "`m` has five words for none of 3 items; item `0`: 2 of 5 words in the answer, asked 3 times \
                (`I cannot say.`); raise `max_new_tokens`, ";
    assert!(ran.logs().iter().any(|line| line.contains(said)), "{:?}", ran.logs());
    assert_eq!((ran.lines("invalid").len(), memo.len(SPACE), server.seen().len()), (3, 9, 9));
    let mut reference = with(&server.url());
    reference["compat"] = json!("reference");
    assert!(!run(&bench, reference).logs().iter().any(|line| line.contains(IN_VAIN)));
    // What the user gave is not the model's.
    let given = Bench::new().input("items", items(2)).input("overrides", r#"{"1": "a, b, c, d, e"}"#);
    let ran = run(&given, with(&server.url()));
    assert!(ran.logs().iter().any(|line| line.contains("five words for none of 1 items")), "{:?}", ran.logs());
}

/// Items that the server refuses say nothing of the model.
#[test]
fn a_model_is_judged_by_its_answers_alone() {
    let refusing = |answered: &'static str, from: usize| {
        Server::start(move |request| match number(request) {
            number if number < from => Reply::Status(400, "", json!({"error": {"message": "not that one"}})),
            _ => Reply::Json(completion(answered)),
        })
    };
    let told = |server: &Server| -> Vec<String> {
        let mut with = with(&server.url());
        with["max_failed_rows"] = json!(4);
        with["extractor"]["max_attempts"] = json!(1);
        let ran = run(&Bench::new().input("items", items(4)), with);
        ran.logs().into_iter().filter(|line| line.contains(IN_VAIN)).map(str::to_owned).collect()
    };
    let of_two = told(&refusing("I cannot say.", 2));
    assert_eq!(of_two.len(), 1);
    assert!(of_two[0].contains("none of 2 items; item `2`: 1 of 5 words"), "{of_two:?}");
    assert!(told(&refusing("[soap, bar, mild, olive, green]", 3)).is_empty());
    // A model that was not heard is not to blame.
    assert!(told(&refusing("", 4)).is_empty());
}

#[test]
fn a_server_that_refuses_settings_of_the_template_is_asked_without_from_then_on() {
    let server = Server::start(|request| match request.body.get("chat_template_kwargs") {
        Some(_) => Reply::Status(422, "", json!({"detail": "extra fields not permitted"})),
        None => Reply::Json(completion(&words(number(request)))),
    });
    let mut with = with(&server.url());
    with["extractor"]["concurrency"] = json!(1);
    let ran = run(&Bench::new().input("items", items(6)), with);
    assert_eq!(tid(&ran, 5), "soap bar mild olive no-5");
    assert_eq!(server.seen().len(), 6 + 1);
    let told = |line: &&str| line.contains("takes no `chat_template_kwargs`");
    assert_eq!(ran.logs().into_iter().filter(told).count(), 1);
    assert!(!ran.logs().iter().any(|line| line.contains("failed")), "a trial is no failure: {:?}", ran.logs());
}

#[test]
fn a_model_that_says_nothing_ends_the_stage_early() {
    for nothing in ["", "<think>\nOkay, let me see, the user wants five words"] {
        let server = Server::start(move |_| Reply::Json(completion(nothing)));
        let bench = Bench::new().input("items", items(100));
        let error = bench.run("tid", with(&server.url())).unwrap_err();
        assert_eq!(error.failure(), Failure::FailedRows);
        assert!(error.to_string().starts_with("`m` says nothing: "), "{error}");
        assert!(error.help_text().unwrap().contains("`max_new_tokens`"));
        assert!((16..30).contains(&server.seen().len()), "{}", server.seen().len());
        // A few may be like that.
        let ran = run(&Bench::new().input("items", items(2)), with(&server.url()));
        assert!(ran.logs().iter().any(|line| line.contains("says nothing: 2 answers")));
        assert!(!ran.logs().iter().any(|line| line.contains(IN_VAIN)), "told once: {:?}", ran.logs());
        assert_eq!(ran.lines("invalid").len(), 2);
    }
}

#[test]
fn what_cannot_run_is_told_before_anything_is_asked() {
    let items = items(1);
    let bench = Bench::new().input("items", &items);
    refuses(bench.run("tid", json!({"extractor": {"model": "no model"}})), &["neither a folder nor a repository"]);
    let mut secret = with("http://127.0.0.1:9/v1");
    secret["extractor"]["api_key_env"] = json!("GRLM_TEST_NO_SUCH_KEY");
    refuses(bench.run("tid", secret), &["`GRLM_TEST_NO_SUCH_KEY` is not set", "secrets:"]);
    let stage = crate::kind("tid").unwrap();
    let paths = |with: Value| -> Vec<String> {
        stage.resolve_params(&with).unwrap_err().into_iter().map(|issue| issue.path).collect()
    };
    assert_eq!(paths(json!({"extractor": {"model": "m", "endpoint": "localhost"}})), ["extractor.endpoint"]);
    assert_eq!(
        paths(json!({"extractor": {"model": " ", "api_key_env": "K"}})),
        ["extractor.model", "extractor.api_key_env"]
    );
    let resolved = stage.resolve_params(&json!({"extractor": {"model": "m", "endpoint": "http://h:1/v1"}})).unwrap();
    assert_eq!(stage.resources(&resolved).unwrap().gpus, 0);
    assert!(stage.models(&resolved).unwrap().is_empty());
    let resolved = stage.resolve_params(&json!({"extractor": {"model": "Qwen/Qwen3-4B"}})).unwrap();
    assert_eq!(stage.models(&resolved).unwrap()["extractor.model"], "Qwen/Qwen3-4B");
}

/// The first answer comes when all others have come and are kept.
#[test]
fn a_slow_answer_holds_up_no_other() {
    let memo = MemoryMemo::default();
    let kept = memo.clone();
    let server = Server::start(move |request| {
        let start = std::time::Instant::now();
        while request.number == 0 && kept.len(SPACE) < 23 && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(5));
        }
        match request.number == 0 && kept.len(SPACE) < 23 {
            true => Reply::Status(400, "", json!("the others wait")),
            false => Reply::Json(completion(&words(number(request)))),
        }
    });
    let with =
        json!({"extractor": {"endpoint": server.url(), "model": "m", "concurrency": 2}, "resolve_collisions": false});
    run(&Bench::new().input("items", items(24)).memo(&memo), with);
    assert_eq!((memo.len(SPACE), memo.appended()), (24, 24));
}

/// With `GRLM_TEST_ENDPOINT=http://localhost:8000/v1` and `GRLM_TEST_ENDPOINT_MODEL=NAME`: a server that runs.
#[test]
fn a_running_server_answers_for_every_item() {
    let (Ok(url), Ok(model)) = (std::env::var("GRLM_TEST_ENDPOINT"), std::env::var("GRLM_TEST_ENDPOINT_MODEL")) else {
        eprintln!("skipped: GRLM_TEST_ENDPOINT and GRLM_TEST_ENDPOINT_MODEL are not set");
        return;
    };
    let memo = MemoryMemo::default();
    let with = json!({"extractor": {"endpoint": url, "model": model, "max_attempts": 2, "concurrency": 2}});
    let bench = Bench::new().input("items", items(4)).memo(&memo);
    let ran = run(&bench, with.clone());
    assert!(memo.len(SPACE) >= 4);
    let took = ran.json("statistics")["extraction"].clone();
    assert!(took["answers"] == 4 && took["answer_tokens"].as_u64().unwrap() > 0, "{took}");
    eprintln!("{took}\n{}", ran.text("tids"));
    assert_eq!(run(&bench, with).text("tids"), ran.text("tids"));
}
