//! The stage with models on this machine, and servers that fail in every way.

use serde_json::{Value, json};

use crate::{
    endpoint::server::{Reply, Request, Server},
    rows::MemoryMemo,
    testing::{Bench, refuses, run, run_on, shared_data},
};

const ITEMS: &str = r#"{"id":"a","title":"red soap bar"}
{"id":"b","title":"red soap"}
{"id":"c","title":"blue gel"}
{"id":"d","title":"blue gel soap"}
{"id":"e"}
"#;

fn ids(value: &Value, key: &str) -> Vec<String> {
    value.as_array().unwrap().iter().map(|n| n[key].as_str().unwrap().to_owned()).collect()
}

#[test]
fn fixed_keeps_the_nearest() {
    let ran = run("similarity", json!({"top_k": 2}), &[("items", ITEMS)]).unwrap();
    let lines = ran.lines("neighbors");
    assert_eq!(lines.iter().map(|l| l["id"].as_str().unwrap()).collect::<Vec<_>>(), ["a", "b", "c", "d", "e"]);
    assert_eq!(ids(&lines[0]["neighbors"], "id"), ["b", "d"]);
    assert_eq!(lines[0]["neighbors"][0]["score"], 1.0);
    assert_eq!(lines[4]["neighbors"], json!([]));
    assert_eq!(ran.logs(), ["1 of 5 items has no neighbours: it has no text (`e`)"]);
}

#[test]
fn the_reference_loses_the_nearest_and_fills_up() {
    let with = json!({"top_k": 2, "compat": "reference"});
    let ran = run("similarity", with, &[("items", ITEMS)]).unwrap();
    assert_eq!(ids(&ran.json("neighbors")["a"], "item_id"), ["d", "c"]);
    assert_eq!(ids(&ran.json("neighbors")["e"], "item_id"), ["b", "c"]);
    assert!(
        ran.text("neighbors").starts_with("{\n  \"a\": [\n    {\n      \"item_id\": \"d\",\n      \"similarity\": 0.")
    );
}

#[test]
fn the_same_bytes_on_any_number_of_threads() {
    let Some(data) = shared_data() else { return };
    let text = std::fs::read_to_string(data.join("data/industrial/industrial.item.json")).unwrap();
    let on = |threads| run_on(threads, "similarity", json!({}), &[("items", &text)]).unwrap().text("neighbors");
    let one = on(1);
    assert_eq!(one.lines().count(), 3686);
    assert_eq!(one, on(3));
}

fn tiny(name: &str) -> String {
    format!("{}/nn/tests/fixtures/encoders/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn a_model_folder_embeds_and_items_without_text_stay_alone() {
    for name in ["bert", "qwen3"] {
        let with = json!({"encoder": {"model": tiny(name), "max_tokens": 40}, "top_k": 10});
        let ran = run("similarity", with.clone(), &[("items", ITEMS)]).unwrap();
        let lines = ran.lines("neighbors");
        // Four items with text are neighbours of each other.
        assert_eq!(lines.iter().map(|l| l["neighbors"].as_array().unwrap().len()).collect::<Vec<_>>(), [3, 3, 3, 3, 0]);
        let same = run_on(3, "similarity", with, &[("items", ITEMS)]).unwrap();
        assert_eq!(same.text("neighbors"), ran.text("neighbors"));
    }
    let with = json!({"encoder": {"model": tiny("qwen3")}, "top_k": 2, "compat": "reference"});
    let ran = run("similarity", with, &[("items", ITEMS)]).unwrap();
    assert_eq!(ids(&ran.json("neighbors")["a"], "item_id").len(), 2);
    let stage = crate::kind("similarity").unwrap();
    let with = stage.resolve_params(&json!({"encoder": {"model": "Qwen/Qwen3-Embedding-8B", "revision": "v1"}}));
    let named = stage.models(&with.unwrap()).unwrap();
    assert_eq!(named.get("encoder.model").map(String::as_str), Some("Qwen/Qwen3-Embedding-8B@v1"));
}

/// A BGE pools by its first token, and `AutoModel.from_pretrained` fetches no file that says so.
#[test]
fn a_model_that_was_fetched_without_its_pooling_is_refused() {
    let cache = tempfile::tempdir().unwrap();
    let snapshot = cache.path().join("models--org--bge/snapshots/0123456789abcdef0123456789abcdef01234567");
    std::fs::create_dir_all(&snapshot).unwrap();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(format!("{}/{file}", tiny("bert")), snapshot.join(file)).unwrap();
    }
    let mut with = json!({"encoder": {"model": snapshot}, "top_k": 2});
    refuses(run("similarity", with.clone(), &[("items", ITEMS)]), &["how it pools", "`pooling`"]);
    with["encoder"]["pooling"] = json!("cls");
    run("similarity", with, &[("items", ITEMS)]).unwrap();
}

/// A vector that says how many letters `e` and `l` a text has.
fn letters(text: &str) -> Value {
    let count = |letter| text.matches(letter).count() as f64;
    json!([count('e') + 0.1, count('l') + 0.1, 2.0])
}

fn embeddings(request: &Request) -> Value {
    let texts = request.body["input"].as_array().unwrap();
    let one = |(index, text): (usize, &Value)| json!({"index": index, "embedding": letters(text.as_str().unwrap())});
    let mut data: Vec<Value> = texts.iter().enumerate().map(one).collect();
    // Servers may answer in any order.
    data.reverse();
    json!({"object": "list", "data": data})
}

/// 70 different titles, each a vector of its own: one that is lost, swapped or asked for twice shows.
#[test]
fn a_server_embeds_whatever_it_does_in_between() {
    let items: String = (0..70)
        .map(|i| format!("{}\n", json!({"id": i.to_string(), "title": "e".repeat(i + 1) + &"l".repeat(70 - i)})))
        .collect();
    let server = Server::start(|request| match request.number {
        0 => Reply::Status(429, "retry-after: 0.05", json!({})),
        1 => Reply::Status(502, "", json!({})),
        2 => Reply::Half(embeddings(request)),
        3 => Reply::Text("no"),
        4 => {
            let mut short = embeddings(request);
            short["data"].as_array_mut().unwrap().pop();
            Reply::Json(short)
        }
        5 => Reply::Hang,
        6 => Reply::Json(json!({"data": [{"index": 0, "embedding": ["x"]}]})),
        7 | 8 => Reply::Slow(std::time::Duration::from_millis(200), embeddings(request)),
        _ => Reply::Json(embeddings(request)),
    });
    let with = |url: &str| json!({"encoder": {"endpoint": url, "model": "m", "timeout": 3.0, "retries": 7, "concurrency": 2}, "top_k": 2});
    let memo = MemoryMemo::default();
    let bench = Bench::new().input("items", &items).memo(&memo);
    let ran = bench.run("similarity", with(&server.url())).unwrap();
    assert_eq!((memo.len("embedding"), memo.appended()), (70, 70));
    for (i, line) in ran.lines("neighbors").iter().enumerate() {
        let near: Vec<usize> = ids(&line["neighbors"], "id").iter().map(|id| id.parse().unwrap()).collect();
        assert!(near.iter().all(|&other| other.abs_diff(i) <= 2 && other != i), "{i}: {near:?}");
    }
    let report = ran.logs().into_iter().find(|line| line.contains("tried again")).unwrap().to_owned();
    assert!(report.contains("7 tried again") && report.contains("2 × another answer"), "{report}");
    let seen = server.seen();
    let mut asked: Vec<&str> = seen.iter().flat_map(|request| texts_of(request)).collect();
    let requests = seen.len() - 7;
    assert!((5..=12).contains(&requests), "{requests}");
    // Those of the seven failures were asked for again, and nothing else twice.
    let failed: usize = seen[..7].iter().map(|request| texts_of(request).len()).sum();
    assert_eq!(asked.len(), 70 + failed);
    asked.sort_unstable();
    asked.dedup();
    assert_eq!(asked.len(), 70);
    assert_eq!(seen[0].path, "/v1/embeddings");
    // Everything is known: neither the server nor its key is needed.
    drop(server);
    let mut with = with("http://127.0.0.1:9/v1");
    with["encoder"]["api_key_env"] = json!("GRLM_TEST_NO_SUCH_KEY");
    assert_eq!(bench.run("similarity", with).unwrap().text("neighbors"), ran.text("neighbors"));
}

/// The first answer comes when all others have come and are kept.
#[test]
fn a_slow_answer_holds_up_no_other() {
    let memo = MemoryMemo::default();
    let kept = memo.clone();
    let server = Server::start(move |request| {
        let others = 100 - texts_of(request).len();
        let start = std::time::Instant::now();
        while request.number == 0 && kept.len("embedding") < others && start.elapsed().as_secs() < 10 {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        match request.number == 0 && kept.len("embedding") < others {
            true => Reply::Status(401, "", json!("the others wait")),
            false => Reply::Json(embeddings(request)),
        }
    });
    let items: String = (0..100).map(|i| format!("{}\n", json!({"id": i, "title": format!("el {i}")}))).collect();
    let with = json!({"encoder": {"endpoint": server.url(), "model": "m", "concurrency": 2}, "top_k": 1});
    Bench::new().input("items", &items).memo(&memo).run("similarity", with).unwrap();
    assert_eq!((memo.len("embedding"), memo.appended()), (100, 100));
}

fn texts_of(request: &Request) -> Vec<&str> {
    request.body["input"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect()
}

/// Whatever the server says: that it is too long, or that something went wrong inside.
#[test]
fn one_text_over_which_a_server_stumbles_leaves_the_others() {
    for status in [400, 500] {
        let server = Server::start(move |request| match texts_of(request).contains(&"Title: blue gel") {
            true => Reply::Status(status, "", json!({"error": {"message": "too blue"}})),
            false => Reply::Json(embeddings(request)),
        });
        let mut with = json!({
            "encoder": {"endpoint": server.url(), "model": "m", "retries": 1, "concurrency": 1}, "top_k": 3,
        });
        let error = run("similarity", with.clone(), &[("items", ITEMS)]).unwrap_err();
        let said = error.to_string();
        assert!(said.contains("1 of 4 items failed") && said.contains("too blue"), "{said}");
        // The four together, again where that may help, and each alone once.
        assert_eq!(server.seen().len(), if status == 400 { 1 + 4 } else { 2 + 4 });
        with["max_failed_rows"] = json!(1);
        let ran = run("similarity", with, &[("items", ITEMS)]).unwrap();
        let counts = |l: &Value| l["neighbors"].as_array().unwrap().len();
        assert_eq!(ran.lines("neighbors").iter().map(counts).collect::<Vec<_>>(), [2, 2, 0, 2, 0]);
    }
}

#[test]
fn a_vector_of_zeros_is_near_to_nothing() {
    let server = Server::start(|request| {
        let mut answer = embeddings(request);
        for one in answer["data"].as_array_mut().unwrap() {
            if texts_of(request)[one["index"].as_u64().unwrap() as usize] == "Title: blue gel" {
                one["embedding"] = json!([0.0, 0.0, 0.0]);
            }
        }
        Reply::Json(answer)
    });
    let with = json!({"encoder": {"endpoint": server.url(), "model": "m"}, "top_k": 3});
    let ran = run("similarity", with, &[("items", ITEMS)]).unwrap();
    let counts = |l: &Value| l["neighbors"].as_array().unwrap().len();
    assert_eq!(ran.lines("neighbors").iter().map(counts).collect::<Vec<_>>(), [2, 2, 0, 2, 0]);
    let told = ["the encoder's vector of it is zero (`c`)", "it has no text (`e`)"];
    assert_eq!(ran.logs(), told.map(|why| format!("1 of 5 items has no neighbours: {why}")));
}

#[test]
fn items_without_neighbours_are_told_by_the_reason() {
    let items = r#"{"id":"a","title":"red soap bar"}
{"id":"b","title":"red soap"}
{"id":"c","title":"the of"}
{"id":"d","description":"weather"}
{"id":"e"}
{"id":"f"}
{"id":"g"}
{"id":"h"}
"#;
    let ran = run("similarity", json!({"encoder": {"tfidf": {"min_df": 1}}}), &[("items", items)]).unwrap();
    let why = [
        "4 of 8 items have no neighbours: they have no text (`e`, `f`, `g`, …)",
        "1 of 8 items has no neighbours: none of its words counts (stop words, too rare or too common) (`c`)",
        "1 of 8 items has no neighbours: its text is unlike any other (`d`)",
    ];
    assert_eq!(ran.logs(), why);
    let with = json!({"encoder": {"tfidf": {"min_df": 1}}, "compat": "reference", "top_k": 1});
    let ran = run("similarity", with, &[("items", items)]).unwrap();
    assert!(ran.logs()[0].starts_with("4 of 8 items are near to none, and get any others: "), "{:?}", ran.logs());

    let server = Server::start(|request| match texts_of(request).contains(&"Title: red soap") {
        true => Reply::Status(400, "", json!({"error": {"message": "too red"}})),
        false => Reply::Json(embeddings(request)),
    });
    let with = json!({"encoder": {"endpoint": server.url(), "model": "m"}, "max_failed_rows": 1});
    let ran = run("similarity", with, &[("items", items)]).unwrap();
    let told: Vec<&str> = ran.logs().into_iter().filter(|line| line.contains("no neighbours")).collect();
    let why = ["1 of 8 items has no neighbours: the encoder failed for it (`b`)", why[0]];
    assert_eq!(told, why);
}

#[test]
fn a_server_is_not_sent_more_of_a_text_than_its_model_may_see() {
    let server = Server::start(|request| Reply::Json(embeddings(request)));
    let items = format!("{}\n{}\n", json!({"id": "a", "title": "é".repeat(100)}), json!({"id": "b", "title": "el"}));
    let with = json!({"encoder": {"endpoint": server.url(), "model": "m", "max_tokens": 4}, "top_k": 1});
    run("similarity", with, &[("items", &items)]).unwrap();
    let mut seen: Vec<String> = server.seen().iter().flat_map(texts_of).map(str::to_owned).collect();
    seen.sort();
    assert_eq!(seen, ["Title: el".to_owned(), format!("Title: {}", "é".repeat(25))]);
}

#[test]
fn bad_input_and_parameters() {
    refuses(run("similarity", json!({}), &[("items", "")]), &["empty"]);
    refuses(run("similarity", json!({}), &[("items", &ITEMS[..40])]), &["input-items:2"]);
    let stage = crate::kind("similarity").unwrap();
    for (with, path) in [
        (json!({"top_k": 0}), "top_k"),
        (json!({"encoder": {"tfidf": {"max_df": 2}}}), "encoder.tfidf.max_df"),
        (json!({"encoder": "tfdif"}), "encoder"),
        (json!({"encoder": {"model": " "}}), "encoder.model"),
        (json!({"encoder": {"model": "/no/such/folder"}}), "encoder.model"),
        (json!({"encoder": {"model": "m", "max_tokens": 0}}), "encoder.max_tokens"),
        (json!({"encoder": {"model": "m", "endpoint": "h:80"}}), "encoder.endpoint"),
        (json!({"encoder": {"model": "m", "endpoint": "http://h/v1", "pooling": "cls"}}), "encoder.pooling"),
        (json!({"encoder": {"model": "m", "endpoint": "http://h/v1", "dtype": "f16"}}), "encoder.dtype"),
        (json!({"encoder": {"model": tiny("bert"), "concurrency": 4}}), "encoder.concurrency"),
    ] {
        assert_eq!(stage.resolve_params(&with).unwrap_err()[0].path, path);
    }
}
