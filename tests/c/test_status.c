/* Messages belong to the thread that failed; files are always named. */
#include "harness.h"

#include <errno.h>
#include <pthread.h>

static void names(void)
{
    CHECK(strcmp(fm_status_name(FM_OK), "OK") == 0);
    CHECK(strcmp(fm_status_name(FM_ERR_FORMAT), "FORMAT") == 0);
    CHECK(strcmp(fm_status_name((fm_status)-12345), "UNKNOWN") == 0);
}

static void message_and_path(void)
{
    CHECK(fm_fail(FM_ERR_ARG, "k is %d, at most %d", 5, 4) == FM_ERR_ARG);
    const fm_error *e = fm_last_error();
    CHECK(strcmp(e->message, "k is 5, at most 4") == 0);
    CHECK(strcmp(e->path, "") == 0 && e->err == 0 && e->status == FM_ERR_ARG);

    CHECK(fm_fail_path(FM_ERR_IO, ENOENT, "/a/b", "cannot open") == FM_ERR_IO);
    e = fm_last_error();
    CHECK_CONTAINS(e->message, "/a/b: cannot open: ");
    CHECK_CONTAINS(e->message, strerror(ENOENT));
    CHECK(strcmp(e->path, "/a/b") == 0 && e->err == ENOENT);

    /* The path is not said twice, and the arguments may be the old message itself. */
    fm_fail_path(FM_ERR_IO, 0, "/a/b", "%s: short", fm_last_error()->path);
    CHECK(strcmp(fm_last_error()->message, "/a/b: short") == 0);
    fm_fail(FM_ERR_STATE, "outer: %s", fm_last_error()->message);
    CHECK(strcmp(fm_last_error()->message, "outer: /a/b: short") == 0);
    CHECK(strcmp(fm_last_error()->path, "") == 0);
}

static void long_texts(void)
{
    char big[10000];
    memset(big, 'x', sizeof(big) - 1);
    big[sizeof(big) - 1] = '\0';
    CHECK(fm_fail(FM_ERR_ARG, "%s", big) == FM_ERR_ARG);
    CHECK(strlen(fm_last_error()->message) > 1000);
    CHECK(fm_fail_path(FM_ERR_IO, EIO, big, "%s", big) == FM_ERR_IO);
    CHECK(strlen(fm_last_error()->path) > 1000);
    CHECK(fm_fail_path(FM_ERR_IO, EIO, NULL, "x") == FM_ERR_IO);
    CHECK(strcmp(fm_last_error()->path, "") == 0);
}

static void *other_thread(void *arg)
{
    (void)arg;
    CHECK(strcmp(fm_last_error()->message, "") == 0);
    fm_fail_path(FM_ERR_NOMEM, 0, "there", "theirs");
    return NULL;
}

static void threads(void)
{
    pthread_t t;
    fm_fail(FM_ERR_ARG, "mine");
    REQUIRE(pthread_create(&t, NULL, other_thread, NULL) == 0);
    pthread_join(t, NULL);
    CHECK(strcmp(fm_last_error()->message, "mine") == 0);
    CHECK(strcmp(fm_last_error()->path, "") == 0);
}

int main(void)
{
    RUN(names);
    RUN(message_and_path);
    RUN(long_texts);
    RUN(threads);
    TEST_EXIT();
}
