/* A stand-in for libdcmi.so, with the layouts of dcmi_interface_api.h. */
#include <string.h>

struct chip { unsigned char type[32], name[32], ver[32]; unsigned aicore_cnt; };
struct hbm { unsigned long long memory_size; unsigned freq; unsigned long long memory_usage; int temp; unsigned use; };
struct ecc { int enable; unsigned single, dbl, total_single, total_double, isolated_single, isolated_double; };
struct pci { unsigned ids[4]; int domain; unsigned bus, device, function; unsigned char reserve[32]; };
struct proc { int id; unsigned long memory; };
static unsigned asked;

int dcmi_init(void) { return 0; }
int dcmi_get_driver_version(char *text, unsigned size) { strncpy(text, "25.5.1", size); return 0; }
int dcmi_get_card_list(int *count, int *cards, int most) { *count = 2; cards[0] = 0; cards[1] = 3; return 0; }
int dcmi_get_device_num_in_card(int card, int *count) { *count = card ? 1 : 2; return 0; }
int dcmi_get_device_chip_info(int card, int device, struct chip *chip)
{
    strcpy((char *)chip->type, "Ascend");
    strcpy((char *)chip->name, "910B3");
    chip->aicore_cnt = 20;
    return 0;
}
int dcmi_get_device_pcie_info_v2(int card, int device, struct pci *pci)
{
    memset(pci, 0, sizeof *pci);
    pci->bus = 0xc1 + card;
    return 0;
}
int dcmi_get_device_hbm_info(int card, int device, struct hbm *hbm)
{
    hbm->memory_size = 65536;
    hbm->freq = 1600;
    hbm->memory_usage = 4096;
    return 0;
}
int dcmi_get_device_ecc_info(int card, int device, int type, struct ecc *ecc)
{
    memset(ecc, 0, sizeof *ecc);
    ecc->total_single = 5;
    ecc->total_double = 2;
    return type == 2 ? 0 : -8001;
}
int dcmi_get_device_power_info(int card, int device, int *power) { *power = 1624; return 0; }
int dcmi_get_device_temperature(int card, int device, int *celsius) { *celsius = 44; return 0; }
int dcmi_get_device_utilization_rate(int card, int device, int kind, unsigned *rate)
{
    if (kind == 10)
        return -8255; /* not supported */
    *rate = 88;
    return 0;
}
int dcmi_get_device_frequency(int card, int device, int kind, unsigned *mhz) { *mhz = kind * 100; return 0; }
int dcmi_get_device_resource_info(int card, int device, struct proc *found, int *count)
{
    found[0].id = 777;
    found[0].memory = 1ul << 33;
    *count = 1;
    return 0;
}
int dcmi_get_device_errorcode_v2(int card, int device, int *count, unsigned *codes, unsigned most)
{
    codes[0] = 0x80CB8009;
    codes[1] = 0x80E18401;
    *count = asked++ ? 2 : 1;
    return 0;
}
