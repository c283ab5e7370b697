//! Items that share a TID, and questions about them.

use super::*;

#[test]
fn items_that_share_a_tid_are_told_apart_by_asking() {
    let server = Server::start(|request| {
        let messages = request.body["messages"].as_array().unwrap();
        let last = messages.last().unwrap()["content"].as_str().unwrap();
        Reply::Json(completion(&match (number(request), messages.len()) {
            (_, 1) => "[soap, bar, mild, olive, green]".to_owned(),
            (1, _) => {
                assert!(last.starts_with("Another product (Soap no. 0 of ours) has the same five words."), "{last}");
                "[soap, bar, mild, olive, red]".to_owned()
            }
            // The same word as item 1 first, then one of its own.
            (2, _) if !last.contains("`red`") => "[soap, bar, mild, olive, red]".to_owned(),
            (2, _) => "[soap, bar, mild, olive, blue]".to_owned(),
            _ => "[soap, bar, mild, olive, green]".to_owned(),
        }))
    });
    let bench = Bench::new().input("items", items(4)).input("overrides", r#"{"3": "a, b, c, d, e"}"#);
    let ran = run(&bench, with(&server.url()));
    let all: Vec<String> = (0..4).map(|line| tid(&ran, line)).collect();
    let own = ["soap bar mild olive green", "soap bar mild olive red", "soap bar mild olive blue", "a b c d e"];
    assert_eq!(all, own);
    assert_eq!(ran.json("statistics")["conflict_analysis"]["total_conflicts"], 0);
    assert!(server.seen().iter().all(|request| number(request) != 3), "the user's own answers are not asked for");

    let mut counted = with(&server.url());
    counted["resolve_collisions"] = json!(false);
    let ran = run(&bench, counted);
    assert_eq!(ran.json("statistics")["conflict_analysis"]["total_conflicts"], 2);
    assert_eq!(ran.json("statistics")["summary"]["collision_rate"], 0.5);
}

#[test]
fn a_refused_question_about_a_collision_leaves_the_shared_tid() {
    let same = || Reply::Json(completion("[soap, bar, mild, olive, green]"));
    let refusing = move |status: u16| {
        Server::start(move |request| match turns(request) {
            1 => same(),
            _ => Reply::Status(status, "", json!({"error": {"message": "context too long"}})),
        })
    };
    let server = refusing(400);
    let ran = run(&Bench::new().input("items", items(3)), with(&server.url()));
    assert!((0..3).all(|line| tid(&ran, line) == "soap bar mild olive green"));
    assert_eq!(ran.json("statistics")["summary"]["collision_rate"], 2.0 / 3.0);
    for words in ["2 of 2 questions failed; questions `1`, `2`: ", "2 items share their TID with another"] {
        assert!(ran.logs().iter().any(|line| line.contains(words)), "{words}: {:?}", ran.logs());
    }
    // A server that answers nobody is another matter.
    let server = refusing(401);
    let error = Bench::new().input("items", items(3)).run("tid", with(&server.url())).unwrap_err();
    assert!(error.to_string().contains("status 401"), "{error}");
}

#[test]
fn rounds_about_collisions_have_a_number_of_their_own() {
    // Each is given the first word that its question does not name.
    let server = Server::start(|request| {
        let last = request.body["messages"].as_array().unwrap().last().unwrap()["content"].as_str().unwrap();
        let color =
            ["green", "red", "blue", "grey", "pink"].into_iter().find(|word| !last.contains(&format!("`{word}`")));
        Reply::Json(completion(&format!("[soap, bar, mild, olive, {}]", color.unwrap())))
    });
    let shared = |rounds: Value| {
        let mut with = with(&server.url());
        with["extractor"]["max_attempts"] = json!(1);
        with["extractor"]["collision_rounds"] = rounds;
        run(&Bench::new().input("items", items(5)), with).json("statistics")["conflict_analysis"]["total_conflicts"]
            .clone()
    };
    assert_eq!([shared(json!(1)), shared(json!(2)), shared(json!(4))], [3, 2, 0]);
}
